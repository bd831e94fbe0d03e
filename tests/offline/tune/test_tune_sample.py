"""Which micro-batches are replayed: evenly chosen, whole, and no more than asked for."""

import json
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tune_runs import E, P, record

from megatron_llep.offline.tune import read_sample
from megatron_llep.offline.tune.sample import choose_rows, spread_order


def make_places(steps, batches, groups, layers):
    return np.array(
        [
            (s, b, g)
            for s in range(steps)
            for b in range(batches)
            for g in range(groups)
            for _ in range(layers)
        ]
    )


@given(
    steps=st.integers(1, 40),
    batches=st.integers(1, 3),
    groups=st.integers(1, 4),
    layers=st.integers(1, 3),
    most=st.integers(1, 50),
)
@settings(max_examples=40, deadline=None)
def test_a_sample_is_bounded_whole_and_even(steps, batches, groups, layers, most):
    places = make_places(steps, batches, groups, layers)
    rows, batch, total = choose_rows(places, most)
    assert total == steps * batches * groups
    number = min(total, most)
    assert np.unique(batch).tolist() == list(range(number))
    assert np.bincount(batch).tolist() == [layers] * number
    for which in range(number):
        assert len(np.unique(places[rows[batch == which]], axis=0)) == 1
    # One from each of `number` parts of the run that are as long as each other, to one.
    ends = np.arange(number + 1) * total // number
    chosen = rows[::layers] // layers
    assert (ends[:-1] <= chosen).all()
    assert (chosen < ends[1:]).all()


def test_a_micro_batch_that_lacks_a_layer_is_left_out():
    places = np.delete(make_places(3, 1, 1, 2), 3, axis=0)
    rows, batch, total = choose_rows(places, 10)
    assert (rows.tolist(), batch.tolist(), total) == ([0, 1, 3, 4], [0, 0, 1, 1], 2)


def test_no_group_is_preferred():
    rows, _, _ = choose_rows(make_places(100, 1, 4, 1), 100)
    seen = np.bincount(rows % 4, minlength=4)
    assert seen.min() >= 15
    assert seen.max() <= 35


@given(st.integers(1, 300), st.integers(1, 12))
@settings(max_examples=40, deadline=None)
def test_every_beginning_of_the_order_is_spread_over_rows_and_periods(length, period):
    order = spread_order(length)
    assert sorted(order.tolist()) == list(range(length))
    beginning = order[: max(length // 2, 1)]
    if length >= 12 * period:
        counts = np.bincount(beginning % period, minlength=period)
        assert counts.min() > 0.5 * len(beginning) / period


def test_a_sample_has_the_counts_of_the_run(tmp_path):
    counts = record(tmp_path, ["lognormal-1"], layers=3, steps=5, groups=2)
    sample = read_sample(tmp_path, 100)
    assert (sample.num_batches, sample.batches_of_run) == (10, 10)
    for found, expected in zip(sample.counts, counts, strict=True):
        np.testing.assert_array_equal(found, expected)
    few = read_sample(tmp_path, 4)
    assert (few.num_batches, len(few.counts), few.batches_of_run) == (4, 12, 10)
    assert few.layers_per_batch == 3
    assert few.tokens_by_batch().tolist() == [8192.0] * 4


def test_a_trace_of_megatron_s_is_read_too(tmp_path):
    generator = np.random.default_rng(0)
    for rank in range(P):
        with (tmp_path / f"router_trace_rank{rank}.jsonl").open("w") as file:
            for step in range(3):
                for layer in range(2):
                    choice = generator.permuted(np.tile(np.arange(E), (50, 1)), axis=1)[:, :2]
                    line = {"step": step, "block": "decoder", "layer": layer, "rank": rank}
                    line |= {"num_tokens": 50, "topk": 2, "top_indices": choice.tolist()}
                    file.write(json.dumps(line) + "\n")
    sample = read_sample(tmp_path, 2, num_ranks=P, num_experts=E)
    assert (sample.num_batches, sample.batches_of_run, len(sample.counts)) == (2, 3, 4)
    assert (sample.num_ranks, sample.num_experts, sample.top_k) == (P, E, 2)
    assert all(each.sum() == P * 50 * 2 for each in sample.counts)
    with pytest.raises(ValueError, match="--ep"):
        read_sample(tmp_path, 2)


def test_what_does_not_fit_is_refused(tmp_path):
    with pytest.raises(ValueError, match="--moe-llep-record"):
        read_sample(tmp_path, 2)
    record(tmp_path / "run", ["balanced"], steps=1)
    with pytest.raises(ValueError, match="--ep 8"):
        read_sample(tmp_path / "run", 2, num_ranks=8)
    with pytest.raises(ValueError, match="--steps 0"):
        read_sample(tmp_path / "run", 0)


def test_a_recording_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    record(tmp_path, ["balanced"], steps=1)
    for name in [
        name for name in sys.modules if name.startswith("megatron_llep.offline.recording")
    ]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"megatron-llep\[record\]"):
        read_sample(tmp_path, 1)
