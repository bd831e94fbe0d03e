"""What cannot be recorded is refused at start-up by all ranks; later a training goes on without."""

import contextlib
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from megatron_llep import LLEPConfig, convert_model, read_metrics, with_llep
from megatron_llep.integration.local_spec import build_local_block_spec
from megatron_llep.layer import LLEPMoELayer
from megatron_llep.metrics import install_tracker
from megatron_llep.offline.cli.replay import Replay
from megatron_llep.offline.recording import (
    RecordedLayer,
    Recording,
    RecordingInfo,
    RecordingWriter,
)
from support.layout import Layout, use_layout
from support.ranks import RankError, run_ranks
from support.recordings import read_batches
from support.training import Run, build_model, make_config, make_tokens, train

RUN = Run(layout=Layout(ep=2, dp=4))
SIZES = {"num_ranks": 2, "num_experts": 8, "top_k": 2, "num_layers": 2, "planner": "exact"}


def refuse_everywhere(llep, pattern, spoil=lambda rank: None, by_spec=False):
    """All ranks refuse alike, and no layer is converted."""

    def work(rank, size):
        spoil(rank)
        with use_layout(RUN.layout):
            config = make_config(RUN)
            chunks = build_model(config, RUN)
            switch_on, of = (with_llep, build_local_block_spec(config))
            if not by_spec:
                switch_on, of = (convert_model, chunks)
            with pytest.raises(ValueError, match=pattern) as error:
                switch_on(of, llep)
            modules = [module for chunk in chunks for module in chunk.modules()]
            assert not any(isinstance(module, LLEPMoELayer) for module in modules)
            return str(error.value)

    messages = run_ranks(work, RUN.layout.world_size)
    assert len(set(messages)) == 1
    return messages[0]


@pytest.mark.parametrize("by_spec", [False, True])
def test_a_folder_that_one_writer_cannot_write(tmp_path, by_spec):
    """Ranks 0 and 2 write, each of its group."""
    folder = tmp_path / "recording"

    def spoil(rank):
        if rank == 2:  # as if its machine had another disk
            mkdir = Path.mkdir

            def fail(self, *args, **options):
                if self == folder:
                    raise PermissionError(13, "Permission denied", str(self))
                mkdir(self, *args, **options)

            Path.mkdir = fail

    llep = LLEPConfig(record=str(folder))
    message = refuse_everywhere(llep, "--moe-llep-record .*Permission denied", spoil, by_spec)
    assert message.endswith("rank 2 refuses it")


def test_without_pyarrow(tmp_path):
    def spoil(rank):
        for name in [name for name in sys.modules if name.startswith("megatron_llep.offline.rec")]:
            del sys.modules[name]
        sys.modules["pyarrow"] = None

    refuse_everywhere(
        LLEPConfig(record=str(tmp_path)), r"--moe-llep-record .*megatron-llep\[record\]", spoil
    )


def test_the_folder_of_another_run(tmp_path):
    writer = RecordingWriter(tmp_path, RecordingInfo(**SIZES | {"num_layers": 7}), "rank0")
    row = {"counts": np.ones((2, 8), np.int64), "lent": np.zeros((0, 3), np.int64)}
    writer.add(RecordedLayer(step=0, micro_batch=0, layer=0, group=0, **row))
    writer.close()
    refuse_everywhere(LLEPConfig(record=str(tmp_path)), "another run was recorded there")


def test_training_goes_on_when_the_disk_is_full(tmp_path):
    """On one rank, after its first piece; told once. The other group's recording is whole."""
    run = replace(RUN, steps=4, micro_batches=8)
    llep = LLEPConfig(record=str(tmp_path))

    def write_pieces(run, step, number):
        writer = install_tracker().recorders[llep.record]._writer
        if writer is not None:
            with contextlib.suppress(RuntimeError):  # the next row's
                writer.flush()
        return make_tokens(run, step, number)

    def work(rank, size):
        plain = train(run, transform_model=lambda chunks: convert_model(chunks, LLEPConfig()))
        if rank == 0:
            write_table, pieces = pq.write_table, []

            def fill_up(*args, **options):
                pieces.append(args[1])
                if len(pieces) > 1:
                    raise OSError(28, "No space left on device")
                write_table(*args, **options)

            pq.write_table = fill_up
        recorded = train(
            replace(run, tokens=write_pieces),
            transform_model=lambda chunks: convert_model(chunks, llep),
        )
        assert recorded.losses == plain.losses
        install_tracker().recorders[llep.record].close()
        sys.stderr.flush()
        return Path("/proc/self/fd/2").read_text()

    said = run_ranks(work, RUN.layout.world_size)
    told = [text.count("the recording ends here, training goes on") for text in said]
    assert told == [1, 0, 0, 0]
    assert "No space left on device" in said[0]
    recording = Recording.open(tmp_path)
    rows = {group: int((recording.places[:, 3] == group).sum()) for group in (0, 1)}
    assert rows[1] == 4 * 2 * 2
    assert 0 < rows[0] < rows[1]


@pytest.mark.slow
def test_ranks_that_are_killed_leave_a_recording_behind(tmp_path):
    """All of them, by SIGKILL, when a piece was due: its steps are whole."""
    llep = LLEPConfig(record=str(tmp_path))
    run = Run(layout=Layout(pp=2, ep=2), steps=10**6)

    def work(rank, size):
        def kill_in_time(run, step, number):
            written = {path.stem.partition("-")[2] for path in tmp_path.glob("*.parquet")}
            if written == {"rank0", "rank2"}:
                os.kill(os.getpid(), signal.SIGKILL)
            if number < 2:  # the first of each data-parallel rank
                read_metrics()
            return make_tokens(run, step, number)

        train(
            replace(run, tokens=kill_in_time),
            transform_model=lambda chunks: convert_model(chunks, llep),
        )

    with pytest.raises(RankError, match="SIGKILL"):
        run_ranks(work, 4, timeout=120)
    recording = Recording.open(tmp_path)
    batches = [len(batch) for batch in read_batches(recording)]
    assert batches.count(2) > 10  # both layers, of two stages
    assert sorted({len(batch) for batch in read_batches(recording)} - {2}) in ([], [1])
    replay = Replay.of(recording)
    assert replay.batches == batches.count(2)
