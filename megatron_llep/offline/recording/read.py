"""Reading a recording, piece by piece.

Shape letters: P ranks that share tokens, E experts.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_llep.offline.recording.layout import INFO_KEY, RecordedLayer, RecordingInfo

_PLACE = ("step", "micro_batch", "layer", "group")


def is_recording(folder: str | Path) -> bool:
    """Whether a folder has pieces of a recording."""
    return any(Path(folder).glob("*-*.parquet"))


_Columns = tuple[np.ndarray, np.ndarray, np.ndarray]
"""All counts of a piece, all loans, and where the loans of each row begin and end."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Recording:
    """A folder of pieces, of which one is in memory at a time."""

    folder: Path
    info: RecordingInfo
    places: np.ndarray
    """int32 [rows, 4]: step, micro-batch, layer, group of each row, sorted; each place once."""
    _at: np.ndarray
    """int64 [rows, 2]: piece, and row in it, of each place."""
    _pieces: tuple[Path, ...]

    @classmethod
    def open(cls, folder: str | Path) -> "Recording":
        """Find out what a folder holds, without the counts.

        Where a run was resumed and repeated steps, the later rows count.

        Raises:
            ValueError: nothing there, or a file is no piece of this recording; names it.
        """
        folder = Path(folder)
        pieces = tuple(sorted(folder.glob("*-*.parquet")))
        if not pieces:
            raise ValueError(
                f"{folder} has no recording: give the folder that a run with --moe-llep-record "
                "wrote to"
            )
        info: RecordingInfo | None = None
        places, at = [], []
        for number, path in enumerate(pieces):
            try:
                file = pq.ParquetFile(path)
                of_piece = RecordingInfo.decode((file.schema_arrow.metadata or {})[INFO_KEY])
                rows = file.read(columns=list(_PLACE))
            except (pa.ArrowException, OSError, KeyError, ValueError) as error:
                raise ValueError(
                    f"{path} cannot be read as a piece of a recording ({error}): remove it"
                ) from error
            if info is not None and of_piece.sizes != info.sizes:
                raise ValueError(
                    f"{path} is of another run than {pieces[0].name}: {of_piece.sizes} ranks, "
                    f"experts, experts a token and layers, not {info.sizes}; record each run in "
                    "a folder of its own"
                )
            info = of_piece
            places.append(np.column_stack([rows[name].to_numpy() for name in _PLACE]))
            at.append(np.column_stack([np.full(len(rows), number), np.arange(len(rows))]))
        assert info is not None
        all_places, all_at = np.concatenate(places), np.concatenate(at)
        # The last of equal places: `unique` gives the first, so turn round.
        unique, first = np.unique(all_places[::-1], axis=0, return_index=True)
        all_at = all_at[::-1][first]
        return cls(folder=folder, info=info, places=unique, _at=all_at, _pieces=pieces)

    @property
    def num_rows(self) -> int:
        """Layers of all micro-batches, of all groups."""
        return len(self.places)

    @property
    def steps(self) -> np.ndarray:
        """int32, ascending."""
        return np.unique(self.places[:, 0])

    @property
    def layers(self) -> np.ndarray:
        """int32, ascending: those that are MoE layers."""
        return np.unique(self.places[:, 2])

    @property
    def groups(self) -> np.ndarray:
        """int32, ascending."""
        return np.unique(self.places[:, 3])

    def read(self, rows: np.ndarray | None = None) -> Iterator[RecordedLayer]:
        """The rows in the order in which they were written, which is nearly that of steps.

        One piece is in memory at a time.

        Args:
            rows: int, which of `places`; default all.
        """
        wanted = np.arange(self.num_rows) if rows is None else np.asarray(rows)
        order = wanted[np.lexsort(self._at[wanted].T[::-1])]
        loaded = -1
        for place in order.tolist():
            piece, row = self._at[place].tolist()
            if piece != loaded:
                loaded, columns = piece, _load(self._pieces[piece])
            yield self._make_row(place, row, columns)

    def _make_row(self, place: int, row: int, columns: _Columns) -> RecordedLayer:
        """Of the columns of its piece."""
        P, E = self.info.num_ranks, self.info.num_experts
        counts, lent, ends = columns
        step, micro_batch, layer, group = self.places[place].tolist()
        return RecordedLayer(
            step=step,
            micro_batch=micro_batch,
            layer=layer,
            group=group,
            counts=counts[row * P * E : (row + 1) * P * E].reshape(P, E).astype(np.int64),
            lent=lent[ends[row] : ends[row + 1]].reshape(-1, 3).astype(np.int64),
        )


def _load(path: Path) -> _Columns:
    table = pq.read_table(path, columns=["counts", "lent"])
    counts, lent = (table[name].combine_chunks() for name in ("counts", "lent"))
    return counts.values.to_numpy(), lent.values.to_numpy(), lent.offsets.to_numpy()
