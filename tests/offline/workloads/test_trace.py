"""Replay of routing traces: written by Megatron's own tracer, and by hand for what goes wrong."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from megatron.core.transformer.moe.router_trace import RouterTracer

from megatron_llep.offline.workloads import make_counts, read_trace, route_tokens

E, K, T = 8, 2, 24
SIZES = {"num_ranks": 2, "num_experts": E, "tokens_per_rank": T, "top_k": K}
LAYERS = ("decoder.layers.12.mlp.router", "mtp.layers.0.mtp_model_layer.mlp.router")


def trace_with_megatron(folder, sizes=SIZES):
    """Two steps of two micro-batches of two layers, through Megatron's forward hook."""
    for rank in range(sizes["num_ranks"]):
        tracer = RouterTracer(str(folder), max_steps=10, rank=rank, training_mode=True)
        for step in range(2):
            for call in range(2):
                for layer, name in enumerate(LAYERS):
                    choice = route_tokens(
                        "lognormal-1", **sizes, rank=rank, seed=layer, step=2 * step + call
                    )
                    routing_map = torch.zeros(T, E, dtype=torch.bool)
                    routing_map.scatter_(1, torch.from_numpy(choice), True)
                    router = SimpleNamespace(topk=K)
                    tracer.make_hook(name)(router, (), (routing_map.float(), routing_map))
            tracer.advance_step(step_id=step + 5)


def test_reads_what_megatron_wrote(tmp_path):
    trace_with_megatron(tmp_path)
    traced = read_trace(tmp_path, num_ranks=2, num_experts=E)
    assert [(t.step, t.call, t.group, t.layer) for t in traced] == [
        (step, call, 0, layer)
        for step in (5, 6)
        for call in (0, 1)
        for layer in ("decoder 12", "mtp 0.0")
    ]
    for i, t in enumerate(traced):
        expected = make_counts("lognormal-1", **SIZES, seed=i % 2, step=i // 2)
        np.testing.assert_array_equal(t.counts, expected)
        assert t.top_k == K


def test_more_traced_ranks_than_a_group_has(tmp_path):
    sizes = SIZES | {"num_ranks": 4}
    trace_with_megatron(tmp_path, sizes)
    first, second = read_trace(tmp_path, num_ranks=2, num_experts=E)[:4:2]
    assert (first.group, second.group) == (0, 1)
    expected = make_counts("lognormal-1", **sizes)
    np.testing.assert_array_equal(np.vstack([first.counts, second.counts]), expected)


def test_fewer_traced_ranks_than_a_group_has(tmp_path):
    trace_with_megatron(tmp_path)
    traced = read_trace(tmp_path, num_ranks=4, num_experts=E)[0]
    assert traced.counts.sum(axis=1).tolist() == [T * K // 2] * 4
    expected = make_counts("lognormal-1", **SIZES)
    np.testing.assert_array_equal(traced.counts[::2] + traced.counts[1::2], expected)


def record(**changes):
    return {
        "step": 0,
        "stage": "pre_dispatch",
        "block": "decoder",
        "layer": 0,
        "rank": 0,
        "num_tokens": 2,
        "topk": 2,
        "top_indices": [[0, 1], [2, 3]],
    } | changes


def write(folder, *lines, rank=0):
    path = folder / f"router_trace_rank{rank}.jsonl"
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines) + "\n")


def test_layers_come_in_the_order_of_their_numbers(tmp_path):
    write(tmp_path, record(layer=10), record(layer=9))
    traced = read_trace(tmp_path, num_ranks=1, num_experts=4)
    assert [t.layer for t in traced] == ["decoder 9", "decoder 10"]


def test_rank_without_tokens(tmp_path):
    write(tmp_path, record())
    write(tmp_path, record(rank=1, num_tokens=0, top_indices=[]), rank=1)
    (traced,) = read_trace(tmp_path, num_ranks=2, num_experts=4)
    assert traced.counts.tolist() == [[1, 1, 1, 1], [0, 0, 0, 0]]


def without(field):
    changed = record()
    del changed[field]
    return changed


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([record(), '{"step": 0, "lay'], r"rank0\.jsonl, line 2 is not JSON.*cut off"),
        ([without("topk")], "line 1 lacks topk: not written by Megatron"),
        (["[1, 2]"], "line 1 is no record"),
        ([record(num_tokens=3)], r"line 1: top_indices are \[2, 2\], not \(3, 2\)"),
        ([record(top_indices=[[0, 1], [2, 9]])], "line 1 has expert 9, but the model has 4"),
    ],
)
def test_bad_lines_are_named(tmp_path, lines, message):
    write(tmp_path, *lines)
    with pytest.raises(ValueError, match=message):
        read_trace(tmp_path, num_ranks=1, num_experts=4)


def test_ranks_that_do_not_belong_together(tmp_path):
    write(tmp_path, record(), record(layer=1))
    write(tmp_path, record(rank=1), rank=1)
    write(tmp_path, record(rank=2), rank=2)
    with pytest.raises(ValueError, match="step 0, decoder 0, call 0 was traced by 3 ranks"):
        read_trace(tmp_path, num_ranks=2, num_experts=4)


def test_nothing_there(tmp_path):
    with pytest.raises(ValueError, match="has no router_trace_rank"):
        read_trace(tmp_path, num_ranks=2, num_experts=4)
    with pytest.raises(ValueError, match="3 experts do not divide over 2"):
        read_trace(tmp_path, num_ranks=2, num_experts=3)
