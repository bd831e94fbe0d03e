"""What is observed and recorded on several nodes, found by hostnames as the lending layer does."""

import contextlib
import io
import socket
from collections import Counter
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker

from megatron_llep import LLEPConfig, convert_model, read_metrics, with_llep
from megatron_llep.integration.observe import make_outlook
from megatron_llep.metrics import PREFIX, install_tracker
from megatron_llep.offline.recording import Recording
from megatron_llep.planner import Topology, make_plan
from megatron_llep.planner.cost.layer import get_layer_cost, get_layer_shape
from megatron_llep.planner.topology import ONE_NODE
from support.layout import Layout, use_layout
from support.llep import EAGER
from support.ranks import run_ranks
from support.routing import Routing
from support.training import Run, build_model, make_config, train

OBSERVE = LLEPConfig(planner="observe", tolerance=0.01, lend_to="own_node")
RUN = Run(layout=Layout(ep=4), routing=Routing("natural"), steps=1, micro_batches=8)
TWO_NODES = Topology(ranks_per_node=2, lend_across_nodes=False)


COLLECTIVES = (
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_object",
    "all_reduce",
    "all_to_all_single",
    "barrier",
    "broadcast",
    "reduce_scatter_tensor",
)


def observe(llep: LLEPConfig | None, by_spec: bool = False) -> tuple[Any, dict[str, int]]:
    """Train, beside it if not plain; what was logged, and the collectives of all steps."""
    destroy_moe_metrics_tracker()
    calls, started = Counter(), Counter()

    def prepare(chunks: Any) -> None:
        if llep is not None and not by_spec:
            convert_model(chunks, llep)
        started.update(calls)

    def end(chunks: Any) -> Any:
        steps = calls - started
        return read_metrics(), steps

    with pytest.MonkeyPatch.context() as patch:
        for name in COLLECTIVES:
            patch.setattr(dist, name, partial(count, calls, name, getattr(dist, name)))
        transform_spec = partial(with_llep, config=llep) if llep and by_spec else None
        result = train(RUN, transform_spec=transform_spec, transform_model=prepare, observe=end)
    if llep is not None and llep.record is not None:
        install_tracker().recorders[llep.record].close()
    logged, steps = result.observed
    return replace(result, observed=logged), dict(steps)


def count(calls: Counter[str], name: str, call: Any, *args: Any, **options: Any) -> Any:
    calls[name] += 1
    return call(*args, **options)


def expect(recording: Recording, topology: Topology) -> dict[str, float]:
    """Of the outlook, by planners and cost model alone."""
    cost = get_layer_cost(make_config(RUN), replace(OBSERVE, cost_model="h200"))
    assert cost is not None
    tables = [row.counts for row in recording.read()]
    plain = [make_plan(counts, max_foreign=0) for counts in tables]

    def predict(plans: list[Any]) -> float:
        pairs = zip(plans, tables, strict=True)
        return float(np.mean([cost.predict(plan, each, topology).total for plan, each in pairs]))

    values = {"planned": float(len(tables))}
    for planner in ("tolerant", "exact", "lla"):
        plans = [
            make_plan(counts, planner=planner, tolerance=0.01, topology=topology, cost=cost)
            for counts in tables
        ]
        values |= {
            f"{planner}_imbalance": np.mean([plan.imbalance_after for plan in plans]),
            f"{planner}_lent_experts": np.mean([len(plan.transfers) for plan in plans]),
            f"{planner}_layer_gain": 100 * (1 - predict(plans) / predict(plain)),
        }
    return {f"{PREFIX}outlook_{name}": float(value) for name, value in values.items()}


def test_two_hosts(tmp_path):
    """Bit for bit plain, no collective more; the outlook and both recordings are of two nodes."""
    folders = {name: str(tmp_path / name) for name in ("observed", "told", "lent")}

    def work(rank: int, size: int) -> Any:
        with pytest.MonkeyPatch.context() as patch, use_layout(RUN.layout):
            patch.setattr(socket, "gethostname", lambda: "aabb"[rank])
            plain, needed = observe(None)
            observed = observe(replace(OBSERVE, record=folders["observed"]))
            told = observe(replace(OBSERVE, ranks_per_node=4, record=folders["told"]))
            by_spec = observe(OBSERVE, by_spec=True)
            observe(replace(EAGER, record=folders["lent"]))
            machine = install_tracker().machine
        assert needed["all_to_all_single"] > 0
        for each, steps in (observed, told, by_spec):
            assert steps == needed, "observing adds none"
            assert each.losses == plain.losses
            for name, expected in plain.parameters.items():
                assert torch.equal(each.parameters[name], expected), name
        return *(each.observed for each, _ in (observed, told, by_spec)), machine

    results = run_ranks(work, 4, timeout=120)
    assert all(each[:3] == results[0][:3] for each in results)
    observed, told, by_spec, _ = results[0]
    recordings = {name: Recording.open(folder) for name, folder in folders.items()}
    for name, per_node in (("observed", 2), ("told", 4), ("lent", 2)):
        info = recordings[name].info
        assert (info.ranks_per_host, info.ranks_per_node) == (2, per_node), name
        assert info.settings["ranks_per_node"] == (4 if name == "told" else None)
    expected = expect(recordings["observed"], TWO_NODES)
    as_one = expect(recordings["told"], ONE_NODE)
    for found, of_nodes in ((observed, expected), (told, as_one), (by_spec, expected)):
        assert {name: found[name] for name in of_nodes} == pytest.approx(of_nodes)
    for planner in ("tolerant", "exact", "lla"):
        gain = f"{PREFIX}outlook_{planner}_layer_gain"
        assert expected[gain] != pytest.approx(as_one[gain]), "else nodes say nothing here"
    lent = f"{PREFIX}outlook_exact_lent_experts"
    assert expected[lent] != as_one[lent], "else nodes say nothing here"
    assert any(len(row.lent) for row in recordings["lent"].read())


def test_loans_have_the_layers_own_prices():
    """Plans are those of the layer; with the usual price of an expert they would be others."""
    llep, config = replace(OBSERVE, lend_to="any_node"), make_config(RUN)
    prices = get_layer_shape(config, llep).prices
    rng = np.random.default_rng(0)
    outlook = make_outlook(config, llep, 2)
    unlike = 0
    for _ in range(20):
        counts = rng.integers(0, 400, (4, 8))
        options = {"tolerance": 0.01, "topology": Topology(ranks_per_node=2)}
        plan = make_plan(counts, **options, prices=prices)
        np.testing.assert_array_equal(outlook.plan(counts, "tolerant").quota, plan.quota)
        unlike += not np.array_equal(make_plan(counts, **options).quota, plan.quota)
    assert unlike > 5


@pytest.mark.parametrize(
    ("hosts", "said", "unsaid"),
    [("aabb", "on 2 nodes", "one node"), ("abab", "count as one node", "2 nodes")],
)
def test_nodes_are_told_at_start_up(hosts, said, unsaid):
    """Also on which nodes; and where hosts do not tell them."""

    def work(rank: int, size: int) -> tuple[str, str]:
        with pytest.MonkeyPatch.context() as patch, use_layout(RUN.layout):
            patch.setattr(socket, "gethostname", lambda: hosts[rank])
            destroy_moe_metrics_tracker()
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                convert_model(build_model(make_config(RUN), RUN), OBSERVE)
            return printed.getvalue(), install_tracker().machine

    outs, machines = zip(*run_ranks(work, 4), strict=True)
    out = outs[0]
    assert said in out
    assert unsaid not in out
    assert len(set(machines)) == 1
    assert ("2 nodes" in machines[0]) == (hosts == "aabb")
