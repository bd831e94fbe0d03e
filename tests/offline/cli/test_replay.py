"""`plan` and `simulate` of a recording."""

import dataclasses
import json
import sys

import numpy as np
import pytest

from megatron_llep.offline.cli import main
from megatron_llep.offline.cli.replay import Replay
from megatron_llep.offline.recording import (
    RecordedLayer,
    Recording,
    RecordingInfo,
    RecordingWriter,
)
from megatron_llep.offline.recording.layout import list_loans
from megatron_llep.offline.workloads import make_counts
from megatron_llep.planner import make_plan
from megatron_llep.planner.cost.model import LayerShape
from megatron_llep.planner.topology import ONE_NODE, Topology

P, E, K, LAYERS = 2, 8, 2, (1, 3)
SHAPE = LayerShape(hidden=64, ffn_hidden=128, num_experts=E, top_k=K)
INFO = RecordingInfo(
    num_ranks=P,
    num_experts=E,
    top_k=K,
    num_layers=4,
    planner="exact",
    model=dataclasses.asdict(SHAPE) | {"other_flops_per_token": 5e6},
)


def run(capsys, *argv):
    status = main([str(arg) for arg in argv])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def counts_of(number, layer):
    """Of the micro-batch of this number in the row of all."""
    return make_counts(
        "lognormal-2", num_ranks=P, num_experts=E, tokens_per_rank=64, top_k=K, seed=layer,
        step=number,
    )  # fmt: skip


def record(folder, *, steps=3, info=INFO, without=()):
    """Two micro-batches and two groups a step: four in a row."""
    writer = RecordingWriter(folder, info, "rank0")
    for number in range(4 * steps):
        for layer in LAYERS:
            if (number, layer) not in without:
                counts = counts_of(number, layer)
                plan = make_plan(counts, planner="exact", imbalance_threshold=1.0)
                writer.add(
                    RecordedLayer(
                        step=10 + number // 4,
                        micro_batch=number // 2 % 2,
                        layer=layer,
                        group=number % 2,
                        counts=counts,
                        lent=list_loans(plan),
                    )
                )
    writer.close()


def test_plan_shows_what_ran_beside(capsys, tmp_path):
    record(tmp_path)
    for number, layer in ((0, 0), (6, 1)):
        argv = ("plan", "--trace", tmp_path, "--step", number, "--layer", layer)
        status, out, _ = run(capsys, *argv, "--planner", "exact", "--max-foreign", 0)
        assert status == 0
        counts = counts_of(number, LAYERS[layer])
        plan = make_plan(counts, planner="exact", imbalance_threshold=1.0)
        lines = out.splitlines()
        assert lines[2] == (
            f"as it ran, planner exact: {plan.imbalance_before:.3f} -> {plan.imbalance_after:.3f} "
            f"x mean; {len(plan.transfers)} experts lent (step {10 + number // 4}, micro-batch "
            f"{number // 2 % 2}, group {number % 2}, layer {LAYERS[layer]})"
        )
        rows = [[int(cell) for cell in line.split()] for line in lines[5:]]
        before = plan.load_per_rank_before.tolist()
        assert rows == [
            [rank, before[rank], before[rank], ran, 0]
            for rank, ran in enumerate(plan.load_per_rank_after.tolist())
        ]


def test_a_place_that_is_not_there(capsys, tmp_path):
    record(tmp_path)
    for argv in (("--step", 12), ("--layer", 2)):
        status, _, err = run(capsys, "plan", "--trace", tmp_path, *argv)
        assert status == 2
        assert "the trace has 2 layers and 12 micro-batches" in err


def test_ranks_that_are_split(capsys, tmp_path):
    record(tmp_path)
    status, out, _ = run(capsys, "plan", "--trace", tmp_path, "--ranks", 4, "--max-foreign", 0)
    assert status == 0
    loads = [int(line.split()[1]) for line in out.splitlines()[5:]]
    assert loads == counts_of(0, 1).sum(axis=0).reshape(4, -1).sum(axis=1).tolist()
    replay = Replay.of(Recording.open(tmp_path), num_ranks=8)
    split = replay.split(counts_of(0, 1))
    np.testing.assert_array_equal(split.reshape(P, 4, E).sum(axis=1), counts_of(0, 1))
    assert np.ptp(split.reshape(P, 4, E), axis=1).max() == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("plan", "--ranks", 3), "--ranks 3"),
        (("plan", "--ranks", 1), "--ranks 1"),
        (("plan", "--ranks", 16), "--ranks 16"),
        (("plan", "--experts", 16), "--experts 16"),
        (("simulate", "--ep", 3), "--ep 3"),
        (("simulate", "--experts", 16), "--experts 16"),
        (("simulate", "--model", "gpt-oss-120b"), "give --experts 8 as well"),
        (("simulate", "--steps", 0), "--steps must be at least 1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(capsys, tmp_path, argv, message):
    record(tmp_path, steps=1)
    status, _, err = run(capsys, argv[0], "--trace", tmp_path, *argv[1:])
    assert status == 2
    assert message in err


def test_micro_batches_that_lack_a_layer_are_left_out(tmp_path):
    record(tmp_path, without={(2, 1), (11, 3)})
    replay = Replay.of(Recording.open(tmp_path))
    assert replay.batches == 10
    kept = [number for number in range(12) if number not in (2, 11)]
    for place, number in enumerate(kept):
        for layer, number_in_model in enumerate(LAYERS):
            expected = counts_of(number, number_in_model)
            np.testing.assert_array_equal(replay.read(layer, place).counts, expected)


def test_where_no_micro_batch_is_whole(capsys, tmp_path):
    record(tmp_path, steps=1, without={(0, 1), (1, 1), (2, 3), (3, 3)})
    status, _, err = run(capsys, "plan", "--trace", tmp_path)
    assert status == 2
    assert "no micro-batch has all 2 layers" in err


NODES = dataclasses.replace(INFO, ranks_per_host=1)


@pytest.mark.parametrize(
    ("flags", "nodes"),
    [
        ((), Topology(ranks_per_node=1)),
        (("--ranks", 4), Topology(ranks_per_node=1)),
        (("--ranks-per-node", 2), ONE_NODE),
    ],
)
def test_plan_goes_by_the_recorded_nodes_and_prices(capsys, tmp_path, flags, nodes):
    # Nearly all tokens of a rank are for the other's experts, and an expert costs few.
    counts = np.array([[1, 1, 1, 1, 90, 50, 50, 50], [90, 50, 50, 50, 1, 1, 1, 1]])
    shape = {"hidden": 4096, "ffn_hidden": 8}
    writer = RecordingWriter(tmp_path, dataclasses.replace(NODES, model=shape), "rank0")
    place = {"step": 0, "micro_batch": 0, "layer": 0, "group": 0}
    writer.add(RecordedLayer(**place, counts=counts, lent=np.zeros((0, 3), np.int64)))
    writer.close()
    _, out, _ = run(capsys, "plan", "--trace", tmp_path, *flags)
    replay = Replay.of(Recording.open(tmp_path), num_ranks=4 if "--ranks" in flags else None)
    prices = LayerShape(**shape, num_experts=E, top_k=K).prices
    plan = make_plan(replay.split(counts), topology=nodes, prices=prices)
    assert f"; {len(plan.transfers)} experts lent" in out.splitlines()[1]
    assert bool(len(plan.transfers)) == (nodes != ONE_NODE)
    assert ("nodes of 1 ranks, as recorded" in out) == (nodes != ONE_NODE)


def test_simulate_goes_by_the_recorded_nodes(capsys, tmp_path):
    record(tmp_path, steps=1, info=NODES)
    argv = ("simulate", "--trace", tmp_path, "--methods", "exact", "--ep", P, 2 * P)
    times = []
    for flags, said in (
        ((), "nodes: EP 2: 2 nodes of 1 ranks, as recorded; EP 4: 4 nodes of 1 ranks, as recorded"),
        (("--ranks-per-node", 4), "nodes: EP 2: 1 node, as told; EP 4: 1 node, as told"),
    ):
        status, out, _ = run(capsys, *argv, *flags, "--output", tmp_path / "out")
        assert status == 0
        assert said in out
        results = json.loads((tmp_path / "out" / "simulate.json").read_text())["results"]
        times.append([result["outcomes"]["plain"]["step_seconds"] for result in results])
    assert all(several > one for several, one in zip(*times, strict=True))


def test_evenly_chosen_from_the_first_to_the_last(tmp_path):
    record(tmp_path)
    counts, number = Replay.of(Recording.open(tmp_path)).load(3)
    assert number == 3
    for step, chosen in enumerate((0, 6, 11, 0, 6)):
        for layer in (0, 1):
            np.testing.assert_array_equal(counts(layer, step), counts_of(chosen, LAYERS[layer]))


def test_simulate_takes_sizes_and_model_from_the_recording(capsys, tmp_path):
    record(tmp_path / "run-7")
    argv = ("simulate", "--trace", tmp_path / "run-7", "--methods", "exact", "optimum")
    status, out, _ = run(capsys, *argv, "--output", tmp_path)
    assert status == 0
    lines = out.splitlines()
    assert lines[1].endswith("steps 10 to 12, 2 layers, planner exact; 12 micro-batches of it")
    (result,) = json.loads((tmp_path / "simulate.json").read_text())["results"]
    assert (result["model"], result["num_ranks"]) == ("run-7", P)
    plain = [
        make_plan(counts_of(number, layer), planner="exact", max_foreign=0).imbalance_after
        for number in range(12)
        for layer in LAYERS
    ]
    assert result["outcomes"]["plain"]["imbalance"] == pytest.approx(np.mean(plain))
    status, out, _ = run(capsys, *argv, "--steps", 5)
    assert "; 5 micro-batches of it" in out
    status, out, _ = run(capsys, *argv, "--ep", 4, "--steps", 1)
    assert status == 0


def test_simulate_another_model_on_the_recorded_routing(capsys, tmp_path):
    record(tmp_path / "run")
    argv = ("--trace", tmp_path / "run", "--model", "gpt-oss-120b", "--experts", E, "--steps", 1)
    status, *_ = run(capsys, "simulate", *argv, "--methods", "exact", "--output", tmp_path)
    assert status == 0
    (result,) = json.loads((tmp_path / "simulate.json").read_text())["results"]
    assert result["model"] == "gpt-oss-120b"
    assert result["tokens_per_rank"] == counts_of(0, 1).sum(axis=1).max() // K


def test_a_recording_that_knows_less_of_its_model(capsys, tmp_path):
    """Of a run in another loop than Megatron's the layers are known; of some, nothing."""
    layers_only = dataclasses.replace(INFO, model=dataclasses.asdict(SHAPE))
    record(tmp_path / "a", steps=1, info=layers_only)
    status, out, _ = run(capsys, "simulate", "--trace", tmp_path / "a", "--methods", "exact")
    assert status == 0
    assert "a step is its MoE layers alone" in out
    record(tmp_path / "b", steps=1, info=dataclasses.replace(INFO, model={}))
    status, _, err = run(capsys, "simulate", "--trace", tmp_path / "b")
    assert status == 2
    assert "give --model" in err


def test_without_pyarrow(capsys, tmp_path, monkeypatch):
    record(tmp_path, steps=1)
    for module in [name for name in sys.modules if name.startswith("megatron_llep.offline.record")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    status, _, err = run(capsys, "plan", "--trace", tmp_path)
    assert status == 2
    assert "pip install 'megatron-llep[record]'" in err
    assert run(capsys, "plan", "--ranks", 2, "--experts", 8)[0] == 0
