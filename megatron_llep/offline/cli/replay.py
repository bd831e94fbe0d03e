"""A recording, as `plan` and `simulate` replay it.

Micro-batches of all groups stand in one row: by step, then micro-batch, then group. Those that lack
a layer are left out: of a run that was killed a stage of the pipeline may have written less.

Shape letters: P ranks, E experts, L layers, B micro-batches.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from megatron_llep.offline.recording import RecordedLayer, Recording


@dataclass(frozen=True, kw_only=True, eq=False)
class Replay:
    """Whole micro-batches of a recording, and the ranks that are to have them."""

    recording: "Recording"
    rows: np.ndarray
    """int [B, L], of the recording's places."""
    num_ranks: int
    """P; a multiple of the ranks that were recorded, each of whose tokens are then split evenly."""

    @classmethod
    def of(
        cls,
        recording: "Recording",
        *,
        num_ranks: int | None = None,
        num_experts: int | None = None,
        flag: str = "--ranks",
    ) -> "Replay":
        """Find the whole micro-batches.

        Args:
            recording: of a run.
            num_ranks: P if it is asked for; None: as recorded.
            num_experts: E if it is asked for, which must be that of the recording.
            flag: that asks for P.

        Raises:
            ValueError: P or E do not fit, or no micro-batch is whole.
        """
        P, E = recording.info.num_ranks, recording.info.num_experts
        if num_experts not in (None, E):
            raise ValueError(
                f"--experts {num_experts}: {recording.folder} was recorded with {E}; leave it out"
            )
        num_ranks = P if num_ranks is None else num_ranks
        if num_ranks < 1 or num_ranks % P or E % num_ranks:
            raise ValueError(
                f"{flag} {num_ranks}: {recording.folder} was recorded on {P} ranks with {E} "
                f"experts; give a multiple of {P} that divides {E}, or leave it out"
            )
        rows = _find_whole_batches(recording)
        if not len(rows):
            raise ValueError(
                f"{recording.folder}: no micro-batch has all {len(recording.layers)} layers, as a "
                "rank's files are missing: give the folder with those of all ranks"
            )
        return cls(recording=recording, rows=rows, num_ranks=num_ranks)

    @property
    def batches(self) -> int:
        """B."""
        return len(self.rows)

    @property
    def layers(self) -> int:
        """L."""
        return self.rows.shape[1]

    @property
    def ranks_per_node(self) -> int | None:
        """As recorded, None where nobody knows; a split makes more nodes of several, not of one."""
        info = self.recording.info
        one = info.ranks_per_node == info.num_ranks
        return self.num_ranks if one else info.ranks_per_node

    def read(self, layer: int, batch: int) -> "RecordedLayer":
        """One of them, as it was recorded."""
        (found,) = self.recording.read(self.rows[batch, layer : layer + 1])
        return found

    def split(self, counts: np.ndarray) -> np.ndarray:
        """Counts [P, E] of those that were recorded."""
        parts = self.num_ranks // len(counts)
        # The parts differ by one at most, and add up to the whole.
        pieces = (counts[:, None, :] + np.arange(parts)[:, None]) // parts
        return pieces.reshape(self.num_ranks, -1)

    def load(self, most: int) -> tuple[Callable[[int, int], np.ndarray], int]:
        """Choose micro-batches evenly, from the first to the last, and keep their counts.

        Args:
            most: micro-batches.

        Returns:
            (layer, number) -> counts [P, E], which starts again after the last; how many there are.
        """
        chosen = np.unique(np.linspace(0, self.batches - 1, min(most, self.batches)).round())
        rows = self.rows[chosen.astype(np.int64)]
        P, E = self.recording.info.num_ranks, self.recording.info.num_experts
        table = np.empty((len(rows), self.layers, P, E), np.int32)
        numbers = {place: number for number, place in enumerate(self._list_places(rows.ravel()))}
        flat = table.reshape(-1, P, E)
        for row in self.recording.read(rows.ravel()):
            flat[numbers[row.step, row.micro_batch, row.layer, row.group]] = row.counts

        def counts(layer: int, number: int) -> np.ndarray:
            return self.split(table[number % len(table), layer].astype(np.int64))

        return counts, len(table)

    def _list_places(self, rows: np.ndarray) -> list[tuple[int, ...]]:
        return [tuple(place) for place in self.recording.places[rows].tolist()]


def open_if_recording(folder: Path) -> "Recording | None":
    """A folder's recording; None where it has none.

    Raises:
        ValueError: its files cannot be read.
        ImportError: it has one, and pyarrow is missing.
    """
    if not any(folder.glob("*-*.parquet")):
        return None
    try:
        from megatron_llep.offline.recording import Recording
    except ImportError as error:
        raise ImportError(
            f"{folder} is a recording, and needs pyarrow: pip install 'megatron-llep[record]'"
        ) from error
    return Recording.open(folder)


def _find_whole_batches(recording: "Recording") -> np.ndarray:
    """[B, L] rows."""
    step, micro_batch, layer, group = recording.places.T
    order = np.lexsort((layer, group, micro_batch, step))
    keys = recording.places[order][:, [0, 1, 3]]
    starts = np.flatnonzero(np.r_[True, (keys[1:] != keys[:-1]).any(axis=1)])
    sizes = np.diff(np.r_[starts, len(order)])
    L = len(recording.layers)
    return order[starts[sizes == L][:, None] + np.arange(L)]
