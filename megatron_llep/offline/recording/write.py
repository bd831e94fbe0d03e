"""Writing a recording beside a training that must not wait for a disk.

Rows go through a bounded queue to a thread, which writes a piece when it has enough of them or has
had them long enough. A piece is written under another name first, so that no reader and no crash
ever sees half of one. Where the disk is slower than the training for long, the training waits:
memory is bounded and nothing is left out. It does not wait for ever, as a disk may hang.
"""

import os
import queue
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_llep.offline.recording.folder import check_writable, find_last_step, find_next_number
from megatron_llep.offline.recording.layout import RecordedLayer, RecordingInfo, make_schema

PIECE_BYTES = 16 * 2**20
"""Of counts, as int32, after which a piece is written."""
PIECE_SECONDS = 30.0
"""After which a piece is written in any case: what a killed run loses at most."""
QUEUED_BYTES = 64 * 2**20
"""Of counts that wait for the thread, and at most so many rows."""
QUEUED_ROWS = 16384
STALL_SECONDS = 60.0
"""For which training waits at most for a disk that takes nothing."""

_COUNTS, _LENT = "counts.list.element", "lent.list.element"
_ENCODING = {
    "step": "DELTA_BINARY_PACKED",
    "micro_batch": "DELTA_BINARY_PACKED",
    "layer": "DELTA_BINARY_PACKED",
    "group": "DELTA_BINARY_PACKED",
    _COUNTS: "DELTA_BINARY_PACKED",
    _LENT: "DELTA_BINARY_PACKED",
}


class RecordingWriter:
    """Appends rows to a folder; one for each rank that writes, each with a name of its own.

    What was there before stays: a run that is resumed goes on in the same folder, and where it
    repeats steps, the later ones count.
    """

    def __init__(
        self,
        folder: str | Path,
        info: RecordingInfo,
        name: str,
        *,
        piece_bytes: int = PIECE_BYTES,
        piece_seconds: float = PIECE_SECONDS,
        stall_seconds: float = STALL_SECONDS,
    ):
        """Start the thread.

        Args:
            folder: made if it is not there.
            info: of all rows.
            name: of this writer among those of the folder: letters, digits and dashes.
            piece_bytes: see `PIECE_BYTES`.
            piece_seconds: see `PIECE_SECONDS`.
            stall_seconds: see `STALL_SECONDS`.

        Raises:
            ValueError: the folder cannot be written to, or is of another run.
        """
        self._folder, self._name = Path(folder), name
        self._schema = make_schema(info)
        self._limits = (piece_bytes, piece_seconds)
        self._stall_seconds = stall_seconds
        check_writable(self._folder)
        find_last_step(self._folder, info)  # refuses another run's
        self._number = find_next_number(self._folder)
        fitting = QUEUED_BYTES // (8 * info.num_ranks * info.num_experts)
        queued = max(16, min(QUEUED_ROWS, fitting))
        self._rows: queue.Queue[RecordedLayer | threading.Event | None] = queue.Queue(queued)
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="recording", daemon=True)
        self._thread.start()

    def add(self, row: RecordedLayer) -> None:
        """Hand a row to the thread.

        Raises:
            RuntimeError: the thread could not write an earlier one, or takes none for long.
        """
        self._check()
        self._put(row)

    def flush(self) -> None:
        """Wait until all rows so far are on disk.

        Raises:
            RuntimeError: as `add`.
        """
        done = threading.Event()
        self._put(done)
        if not done.wait(self._stall_seconds):
            raise self._stalled()
        self._check()

    def close(self) -> None:
        """Write what is left, and end the thread.

        Raises:
            RuntimeError: as `add`.
        """
        if self._thread.is_alive():  # not in a forked process, which has no such thread
            self._put(None)
            self._thread.join(self._stall_seconds)
            if self._thread.is_alive():
                raise self._stalled()
        self._check()

    def _put(self, item: RecordedLayer | threading.Event | None) -> None:
        try:
            self._rows.put(item, timeout=self._stall_seconds)
        except queue.Full:
            raise self._stalled() from None

    def _check(self) -> None:
        if self._failure is not None:
            raise RuntimeError(
                f"--moe-llep-record {self._folder}: {self._failure}; make room there, or train "
                "without it"
            ) from self._failure

    def _stalled(self) -> RuntimeError:
        return RuntimeError(
            f"--moe-llep-record {self._folder}: nothing could be written for "
            f"{self._stall_seconds:.0f} s; see to the disk, or train without it"
        )

    def _run(self) -> None:
        """Take rows until there is a None."""
        piece_bytes, piece_seconds = self._limits
        rows: list[RecordedLayer] = []
        held, due = 0, 0.0
        while True:
            try:
                row = self._rows.get(timeout=max(0.0, due - time.monotonic()) if rows else None)
            except queue.Empty:
                row = threading.Event()  # of nobody: the piece is due
            if isinstance(row, RecordedLayer):
                if not rows:
                    due = time.monotonic() + piece_seconds
                rows.append(row)
                held += 4 * row.counts.size
                if held < piece_bytes and time.monotonic() < due:
                    continue
            try:
                if rows and self._failure is None:
                    self._write(rows)
            except Exception as error:  # whatever it is, `add` must not wait for a dead thread
                self._failure = error
            rows, held = [], 0
            if row is None:
                return
            if isinstance(row, threading.Event):
                row.set()

    def _write(self, rows: list[RecordedLayer]) -> None:
        """Write one piece."""
        columns = [
            pa.array([row.step for row in rows], pa.int32()),
            pa.array([row.micro_batch for row in rows], pa.int32()),
            pa.array([row.layer for row in rows], pa.int32()),
            pa.array([row.group for row in rows], pa.int32()),
            _make_lists([row.counts for row in rows]),
            _make_lists([row.lent for row in rows]),
        ]
        path = self._folder / f"{self._number:06d}-{self._name}.parquet"
        part = path.with_suffix(".part")
        pq.write_table(
            pa.Table.from_arrays(columns, schema=self._schema),
            part,
            compression="zstd",
            use_dictionary=False,
            column_encoding=_ENCODING,
            write_statistics=["step"],
        )
        os.replace(part, path)
        self._number += 1


def _make_lists(arrays: list[np.ndarray]) -> pa.ListArray:
    """A list of int32 for each array."""
    ends = np.cumsum([0, *(array.size for array in arrays)], dtype=np.int32)
    values = np.concatenate([array.ravel() for array in arrays]).astype(np.int32)
    return pa.ListArray.from_arrays(ends, values)
