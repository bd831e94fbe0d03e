"""What is written is read: whole, in pieces, after a crash, of a run that was resumed."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_llep.offline.recording import (
    RecordedLayer,
    Recording,
    RecordingInfo,
    RecordingWriter,
    is_recording,
)
from megatron_llep.offline.recording.layout import list_loans
from megatron_llep.planner import make_plan
from support.recordings import read_batches

P, E = 4, 8


def make_info(**changes):
    sizes = {"num_ranks": P, "num_experts": E, "top_k": 2, "num_layers": 3, "planner": "exact"}
    return RecordingInfo(**(sizes | changes))


def make_row(step, layer, *, micro_batch=0, group=0, seed=0):
    rng = np.random.default_rng((seed, step, micro_batch, layer, group))
    counts = rng.integers(0, 500, (P, E)) * (rng.random(E) < 0.5)
    lent = list_loans(make_plan(counts, planner="exact"))
    return RecordedLayer(
        step=step, micro_batch=micro_batch, layer=layer, group=group, counts=counts, lent=lent
    )


def write(folder, rows, name="a", info=None, **limits):
    writer = RecordingWriter(folder, info or make_info(), name, **limits)
    for row in rows:
        writer.add(row)
    writer.close()


def place(row):
    return (row.step, row.micro_batch, row.layer, row.group)


def assert_same(found, expected):
    assert [place(row) for row in found] == [place(row) for row in expected]
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one.counts, other.counts)
        np.testing.assert_array_equal(one.lent, other.lent)


@pytest.mark.parametrize(
    ("info", "expected"),
    [
        ({"ranks_per_host": 2}, 2),
        ({"ranks_per_host": 4, "settings": {"ranks_per_node": None}}, 4),
        ({"ranks_per_host": 4, "settings": {"ranks_per_node": 2}}, 2),
        ({}, None),
    ],
)
def test_nodes_are_as_told_else_as_found(tmp_path, info, expected):
    write(tmp_path, [make_row(0, 0)], info=make_info(**info))
    assert Recording.open(tmp_path).info.ranks_per_node == expected


@pytest.mark.parametrize("told", [None, 2])
def test_a_recording_that_does_not_know_what_was_found_opens(told):
    known = json.loads(make_info(settings={"ranks_per_node": told}).encode())
    del known["ranks_per_host"]
    info = RecordingInfo.decode(json.dumps(known).encode())
    assert (info.ranks_per_host, info.ranks_per_node) == (None, told)


@given(piece_bytes=st.integers(1, 4 * P * E * 30), steps=st.integers(1, 7))
@settings(max_examples=10, deadline=None)
def test_rows_come_back_from_any_pieces(tmp_path_factory, piece_bytes, steps):
    folder = tmp_path_factory.mktemp("recording")
    rows = [make_row(step, layer) for step in range(steps) for layer in (0, 2)]
    write(folder, rows, piece_bytes=piece_bytes)
    recording = Recording.open(folder)
    assert recording.info == make_info()
    assert_same(list(recording.read()), rows)
    assert_same([row for batch in read_batches(recording) for row in batch], rows)
    assert recording.layers.tolist() == [0, 2]


def test_the_plan_that_ran_comes_back(tmp_path):
    row = make_row(0, 0, seed=3)
    write(tmp_path, [row])
    (found,) = Recording.open(tmp_path).read()
    plan = make_plan(row.counts, planner="exact")
    assert len(plan.transfers) > 0
    np.testing.assert_array_equal(found.plan.quota, plan.quota)
    np.testing.assert_array_equal(found.plan.transfers, plan.transfers)


def test_batches_join_what_several_writers_wrote(tmp_path):
    layers = {"stage-0": 0, "stage-1": 1}
    for name, layer in layers.items():
        rows = [
            make_row(step, layer, micro_batch=m, group=g)
            for step in range(3)
            for m in (0, 1)
            for g in (0, 1)
        ]
        write(tmp_path, rows, name=name, piece_bytes=4 * P * E * 5)
    batches = list(read_batches(Recording.open(tmp_path)))
    keys = [(b[0].step, b[0].micro_batch, b[0].group) for b in batches]
    assert keys == [(s, m, g) for s in range(3) for m in (0, 1) for g in (0, 1)]
    for batch, key in zip(batches, keys, strict=True):
        s, m, g = key
        assert_same(batch, [make_row(s, layer, micro_batch=m, group=g) for layer in (0, 1)])


def test_of_steps_that_a_resumed_run_repeats_the_later_count(tmp_path):
    write(tmp_path, [make_row(step, 0, seed=1) for step in range(4)])
    write(tmp_path, [make_row(step, 0, seed=2) for step in range(2, 6)])
    expected = [make_row(step, 0, seed=1 if step < 2 else 2) for step in range(6)]
    (found,) = [[row for b in read_batches(Recording.open(tmp_path)) for row in b]]
    assert_same(found, expected)


def test_a_killed_writer_leaves_whole_pieces(tmp_path):
    program = (
        "import sys\n"
        "from test_recording import make_info, make_row, P, E\n"
        "from megatron_llep.offline.recording import RecordingWriter\n"
        "writer = RecordingWriter(sys.argv[1], make_info(), 'a', piece_bytes=4 * P * E * 10)\n"
        "step = 0\n"
        "while True:\n"
        "    writer.add(make_row(step, 0)); step += 1\n"
    )
    here = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], env=here)
    try:
        due = time.monotonic() + 60
        while len(list(tmp_path.glob("*.parquet"))) < 3:
            assert time.monotonic() < due, "nothing was written"
            assert run.poll() is None
            time.sleep(0.05)
    finally:
        run.send_signal(signal.SIGKILL)
        run.wait()
    recording = Recording.open(tmp_path)
    assert recording.num_rows >= 30
    assert_same(list(recording.read()), [make_row(s, 0) for s in range(recording.num_rows)])


def test_a_piece_is_written_when_it_is_due(tmp_path):
    writer = RecordingWriter(tmp_path, make_info(), "a", piece_seconds=0.2)
    writer.add(make_row(0, 0))
    due = time.monotonic() + 30
    while not is_recording(tmp_path):
        assert time.monotonic() < due
        time.sleep(0.02)
    writer.close()
    assert Recording.open(tmp_path).num_rows == 1


def test_what_is_no_recording_is_refused(tmp_path):
    with pytest.raises(ValueError, match="--moe-llep-record"):
        Recording.open(tmp_path)
    write(tmp_path, [make_row(0, 0)])
    (piece,) = tmp_path.glob("*.parquet")
    (tmp_path / "000001-b.parquet").write_bytes(piece.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"000001-b\.parquet"):
        Recording.open(tmp_path)


def test_two_runs_in_one_folder_are_refused(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    write(first, [make_row(0, 0)])
    with pytest.raises(ValueError, match=r"--moe-llep-record .* another run"):
        write(first, [make_row(0, 0)], name="b", info=make_info(num_layers=5))
    write(second, [make_row(0, 0)], name="b", info=make_info(num_layers=5))
    (piece,) = second.iterdir()
    piece.rename(first / piece.name)
    with pytest.raises(ValueError, match="another run"):
        Recording.open(first)


def add_many(writer):
    """More than are held for the thread."""
    row = make_row(0, 0)
    for _ in range(20_000):
        writer.add(row)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), pa.ArrowInvalid("?")])
def test_a_writer_that_fails_says_so_and_holds_nobody_up(tmp_path, monkeypatch, error):
    def fail(*args, **options):
        raise error

    monkeypatch.setattr(pq, "write_table", fail)
    writer = RecordingWriter(tmp_path, make_info(), "a", piece_bytes=1)
    with pytest.raises(RuntimeError, match="--moe-llep-record"):
        add_many(writer)
    with pytest.raises(RuntimeError, match="--moe-llep-record"):
        writer.close()


def test_a_disk_that_hangs_is_not_waited_for_for_ever(tmp_path, monkeypatch):
    hangs = threading.Event()
    monkeypatch.setattr(pq, "write_table", lambda *args, **options: hangs.wait(60))
    writer = RecordingWriter(tmp_path, make_info(), "a", piece_bytes=1, stall_seconds=0.2)
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="nothing could be written"):
        add_many(writer)
    with pytest.raises(RuntimeError, match="nothing could be written"):
        writer.flush()
    hangs.set()
    assert time.monotonic() - start < 30


def test_a_folder_that_cannot_be_written_is_refused_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="--moe-llep-record"):
        RecordingWriter(tmp_path / "file", make_info(), "a")


def test_a_thousand_steps_of_a_large_model_fit_into_200_mb(tmp_path):
    """48 layers, 128 experts, 8 ranks, 4,096 tokens of 8 experts: scaled up from 4 steps."""
    rng = np.random.default_rng(0)
    steps, layers, ranks, experts = 4, 48, 8, 128
    popular = rng.lognormal(0, 1, (layers, experts))
    popular /= popular.sum(axis=1, keepdims=True)
    rows = [
        RecordedLayer(
            step=step,
            micro_batch=0,
            layer=layer,
            group=0,
            counts=rng.multinomial(4096 * 8, popular[layer], size=ranks),
            lent=np.zeros((20, 3), np.int64),
        )
        for step in range(steps)
        for layer in range(layers)
    ]
    info = make_info(num_ranks=ranks, num_experts=experts, num_layers=layers)
    write(tmp_path, rows, info=info)
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert size * 1000 / steps < 200e6
