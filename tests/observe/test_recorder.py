"""What a training with `--moe-llep-record` leaves: all that was routed and what was lent, once."""

import argparse
import contextlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.transformer.moe.router import TopKRouter
from megatron.training import global_vars

from megatron_llep import LLEPConfig, convert_model, read_metrics, with_llep
from megatron_llep.metrics import install_tracker, number_in_model
from megatron_llep.offline.recording import Recording
from megatron_llep.planner import make_plan
from support.layout import Layout, use_layout
from support.ranks import run_ranks
from support.recordings import read_batches
from support.routing import Routing
from support.training import Run, build_model, make_config, make_tokens, train

TOLERANT = LLEPConfig(tolerance=0.01)


class Loop:
    """Megatron's loop as far as it tells where it is: its arguments, set by `train`'s data.

    All ranks report after each step, as it does.
    """

    def __init__(self, first: int = 0) -> None:
        self.args = argparse.Namespace(curr_iteration=first)
        self._first = first

    def make_tokens(self, run: Run, step: int, number: int) -> torch.Tensor:
        if self.args.curr_iteration != self._first + step:
            read_metrics()
            self.args.curr_iteration += 1
        return make_tokens(run, step, number)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        global_vars.set_args(self.args)
        try:
            yield
        finally:
            global_vars.unset_global_variables()


def watch_routers(chunks: Any, seen: dict[int, list[np.ndarray]]) -> None:
    """Note the tokens of this rank for each expert, by layer, in forwards that autograd records."""
    for chunk in chunks:
        for router in chunk.modules():
            if isinstance(router, TopKRouter):
                is_mtp = getattr(router, "is_mtp_layer", False)
                layer = number_in_model(router.layer_number, is_mtp, router.config)
                router.register_forward_hook(partial(_note, seen, layer))


def _note(seen: Any, layer: int, router: Any, inputs: Any, output: Any) -> None:
    if torch.is_grad_enabled() and router.training:
        seen[layer].append(output[1].sum(dim=0).numpy())


def record(run: Run, llep: LLEPConfig, loop: Loop | None = None, by_spec: bool = False) -> Any:
    """Train, and close the recording; what this rank's routers saw, by layer."""
    seen: dict[int, list[np.ndarray]] = defaultdict(list)

    def prepare(chunks: Any) -> None:
        if not by_spec:
            convert_model(chunks, llep)
        watch_routers(chunks, seen)

    if loop is not None:
        run = replace(run, tokens=loop.make_tokens)
    with loop.running() if loop is not None else contextlib.nullcontext():
        train(
            run,
            transform_model=prepare,
            transform_spec=partial(with_llep, config=llep) if by_spec else None,
            observe=lambda chunks: read_metrics(),
        )
    assert llep.record is not None
    install_tracker().recorders[llep.record].close()
    return dict(seen)


def record_on_ranks(run: Run, llep: LLEPConfig, first: int = 0, **options: Any) -> list[Any]:
    def work(rank: int, size: int) -> Any:
        return record(run, llep, Loop(first), **options)

    return run_ranks(work, run.layout.world_size, timeout=120)


def check_counts(
    recording: Recording, seen: list[Any], ranks_of: Any, *, steps: range, sources: int = 1
) -> None:
    """Each row is what the routers of its ranks saw.

    Args:
        recording: of a run.
        seen: by rank of the job.
        ranks_of: (layer, group) -> those ranks.
        steps: that were trained, with as many micro-batches each.
        sources: ranks of the job for each in the recording.
    """
    rows = list(recording.read())
    assert len(rows) == recording.num_rows > 0
    expected = 0
    for row in rows:
        of_ranks = [seen[rank][row.layer] for rank in ranks_of(row.layer, row.group)]
        a_step = len(of_ranks[0]) // len(steps)
        number = (row.step - steps[0]) * a_step + row.micro_batch
        assert row.micro_batch < a_step
        counts = np.stack([of_rank[number] for of_rank in of_ranks])
        np.testing.assert_array_equal(
            row.counts, counts.reshape(-1, sources, counts.shape[1]).sum(axis=1)
        )
    for layer in recording.layers.tolist():
        for group in recording.groups.tolist():
            expected += len(seen[ranks_of(layer, group)[0]][layer])
    assert len(rows) == expected
    assert recording.steps.tolist() == list(steps)


def test_what_routers_saw_and_what_was_planned(tmp_path):
    """With layers of multi-token prediction, several micro-batches, data parallelism."""
    llep = replace(TOLERANT, record=str(tmp_path))
    run = Run(
        layout=Layout(ep=2, dp=4),
        steps=2,
        micro_batches=8,
        config={"mtp_num_layers": 1},
    )
    seen = record_on_ranks(run, llep, first=5)
    recording = Recording.open(tmp_path)
    assert recording.layers.tolist() == [0, 1, 2]
    assert recording.groups.tolist() == [0, 1]
    assert (recording.info.num_layers, recording.info.top_k) == (3, 2)
    check_counts(recording, seen, lambda layer, g: (2 * g, 2 * g + 1), steps=range(5, 7))
    lent = 0
    for row in recording.read():
        plan = make_plan(row.counts, planner="tolerant", tolerance=0.01)
        np.testing.assert_array_equal(row.plan.quota, plan.quota)
        np.testing.assert_array_equal(row.plan.transfers, plan.transfers)
        lent += len(plan.transfers)
    assert lent > 0


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("vpp", "planner"),
    [
        (2, "tolerant"),
        (None, "observe"),
        pytest.param(None, "tolerant", marks=SLOW),
        pytest.param(2, "observe", marks=SLOW),
    ],
)
def test_stages_of_a_pipeline(tmp_path, vpp, planner):
    llep = replace(TOLERANT, planner=planner, record=str(tmp_path))
    run = Run(
        layout=Layout(ep=2, pp=2, vpp=vpp),
        micro_batches=8,
        config={"num_layers": 4},
    )
    seen = record_on_ranks(run, llep)
    recording = Recording.open(tmp_path)
    assert recording.layers.tolist() == [0, 1, 2, 3]
    stages = [0, 1, 0, 1] if vpp else [0, 0, 1, 1]
    check_counts(
        recording, seen, lambda layer, g: (2 * stages[layer], 2 * stages[layer] + 1), steps=range(2)
    )
    assert [len(batch) for batch in read_batches(recording)] == [4] * 8


def test_expert_tensor_parallel_sources_are_added_up(tmp_path):
    llep = replace(TOLERANT, record=str(tmp_path))
    run = Run(layout=Layout(tp=2, ep=2, etp=2))
    seen = record_on_ranks(run, llep)
    recording = Recording.open(tmp_path)
    assert recording.info.num_ranks == 2
    check_counts(recording, seen, lambda layer, g: range(4), steps=range(2), sources=2)
    assert recording.info.model["ffn_hidden"] == 32


def test_replicas_that_share_tokens_are_ranks_of_one_group(tmp_path):
    llep = replace(TOLERANT, replicas="expert-dp", record=str(tmp_path))
    run = Run(layout=Layout(ep=2, dp=4))
    seen = record_on_ranks(run, llep)
    recording = Recording.open(tmp_path)
    assert recording.groups.tolist() == [0]
    assert (recording.info.num_ranks, recording.info.num_experts) == (4, 16)
    assert recording.info.ranks_per_node == 4, "of the ranks that are joined"
    for row in recording.read():
        number = row.step * len(seen[0][row.layer]) // 2 + row.micro_batch
        counts = np.stack([seen[rank][row.layer][number] for rank in range(4)])
        np.testing.assert_array_equal(row.counts.reshape(4, 2, 8).sum(axis=1), counts)


@pytest.mark.parametrize("by_spec", [True, pytest.param(False, marks=SLOW)])
def test_a_recomputed_forward_counts_once(tmp_path, by_spec):
    llep = replace(TOLERANT, record=str(tmp_path))
    full = {"recompute_granularity": "full", "recompute_method": "uniform"}
    run = Run(layout=Layout(ep=2), config=full | {"recompute_num_layers": 1})
    seen = record_on_ranks(run, llep, by_spec=by_spec)
    check_counts(Recording.open(tmp_path), seen, lambda layer, g: (0, 1), steps=range(2))


def test_a_resumed_run_goes_on(tmp_path):
    """Steps 0 to 2, then again 2 to 4: of step 2 the later one counts."""
    llep = replace(TOLERANT, record=str(tmp_path))
    run = Run(layout=Layout(ep=2), steps=3)
    seen = record_on_ranks(run, llep)
    again = record_on_ranks(replace(run, routing=Routing("hot")), llep, first=2)
    recording = Recording.open(tmp_path)
    assert recording.steps.tolist() == [0, 1, 2, 3, 4]
    for row in recording.read():
        source, first = (again, 2) if row.step >= 2 else (seen, 0)
        for rank, counts in enumerate(row.counts):
            a_step = len(source[rank][row.layer]) // 3
            number = (row.step - first) * a_step + row.micro_batch
            np.testing.assert_array_equal(counts, source[rank][row.layer][number])


OBSERVED = {
    "groups": (Run(layout=Layout(ep=2, dp=4), micro_batches=8, config={"mtp_num_layers": 1}), 1),
    "etp": (Run(layout=Layout(tp=2, ep=2, etp=2)), 2),
    "alone": (Run(layout=Layout(dp=2)), 1),
}


@pytest.mark.parametrize(
    ("name", "by_spec"),
    [
        ("groups", False),
        ("etp", True),
        pytest.param("groups", True, marks=SLOW),
        pytest.param("etp", False, marks=SLOW),
        pytest.param("alone", False, marks=SLOW),
    ],
)
def test_what_is_observed_beside_plain_expert_parallelism(tmp_path, name, by_spec):
    run, sources = OBSERVED[name]
    if by_spec:  # of multi-token prediction Megatron makes the layers by itself
        run = replace(run, config={})
    seen = record_on_ranks(run, LLEPConfig(planner="observe", record=str(tmp_path)), first=3,
                           by_spec=by_spec)  # fmt: skip
    recording = Recording.open(tmp_path)
    ranks = recording.info.num_ranks * sources
    assert len(recording.groups) == run.layout.world_size // ranks
    check_counts(
        recording,
        seen,
        lambda layer, g: range(ranks * g, ranks * (g + 1)),
        steps=range(3, 5),
        sources=sources,
    )
    assert recording.info.planner == "observe"
    assert all(row.plan.is_fallback for row in recording.read())


def test_another_loop_counts_steps_by_its_reports(tmp_path):
    """Twice, as for a run that is resumed; some report twice a step, or before the first."""
    llep = replace(TOLERANT, record=str(tmp_path))
    run = Run(layout=Layout(ep=2), steps=3)

    def work(rank: int, size: int, reports: int) -> None:
        last_step = -1

        def report_between(run: Run, step: int, number: int) -> torch.Tensor:
            nonlocal last_step
            if step != last_step:
                last_step = step
                for _ in range(reports):
                    read_metrics()
            return make_tokens(run, step, number)

        record(replace(run, tokens=report_between), llep)

    for reports in (1, 2):
        run_ranks(work, 2, reports)
    recording = Recording.open(tmp_path)
    places = [tuple(place) for place in recording.places[:, :3].tolist()]
    assert places == [(step, m, layer) for step in range(6) for m in range(2) for layer in range(2)]


def test_evaluation_is_not_recorded(tmp_path):
    llep = replace(TOLERANT, record=str(tmp_path))
    run = Run(layout=Layout(ep=2))

    def work(rank: int, size: int) -> None:
        with use_layout(run.layout):
            (model,) = convert_model(build_model(make_config(run), run), llep)
            tokens = make_tokens(run, 0, rank)[:, :-1]
            positions = torch.arange(tokens.shape[1]).expand_as(tokens)
            with torch.no_grad():
                model(tokens, positions, None)
            model.eval()
            model(tokens, positions, None)
            model.train()
            model(tokens, positions, None)
        install_tracker().recorders[str(tmp_path)].close()

    run_ranks(work, 2)
    assert Recording.open(tmp_path).num_rows == 2
