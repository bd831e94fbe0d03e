"""One pass through a recording: imbalance by layer and column, and loads of experts.

What is kept does not grow with the recording: numbers for each cell, and where its worst layer of a
micro-batch is to be found again.

Shape letters: L MoE layers, C columns, D columns of drift, P ranks, E experts, N loans.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from megatron_llep.offline.recording import Recording
from megatron_llep.offline.view.columns import Columns


@dataclass(frozen=True, kw_only=True, eq=False)
class Gathered:
    """All arrays have [L, C] cells; imbalance is the largest load of a rank / the mean load."""

    layers: np.ndarray
    """[L] their numbers."""
    columns: Columns
    rows: np.ndarray
    """How many layers of micro-batches a cell sums up; 0 where it has none."""
    mean_before: np.ndarray
    """Imbalance under plain expert parallelism."""
    worst_before: np.ndarray
    mean_after: np.ndarray
    """Imbalance with what was lent."""
    worst_after: np.ndarray
    worst: np.ndarray
    """[L, C] number of the recording's row that is worst before; -1 where there is none."""
    drift_columns: Columns
    expert_loads: np.ndarray
    """[L, D, E] pairs of each expert."""


def gather(
    recording: Recording,
    columns: Columns,
    drift_columns: Columns,
    on_row: Callable[[], None] = lambda: None,
) -> Gathered:
    """Go through all rows once.

    Args:
        recording: what to sum up.
        columns: of the cells.
        drift_columns: of the loads of experts.
        on_row: called after each row, for a progress bar.
    """
    P, E = recording.info.num_ranks, recording.info.num_experts
    layers = recording.layers
    L, C = len(layers), len(columns)
    rows = np.zeros((L, C), np.int64)
    sums = np.zeros((2, L, C))
    worst = np.zeros((2, L, C))
    places = np.zeros((L, C, 4), np.int64)
    loads_LDE = np.zeros((L, len(drift_columns), E), np.int64)
    layer_at = {number: index for index, number in enumerate(layers.tolist())}
    steps = recording.steps
    column_at = dict(zip(steps.tolist(), columns.find(steps).tolist(), strict=True))
    drift_at = dict(zip(steps.tolist(), drift_columns.find(steps).tolist(), strict=True))
    for row in recording.read():
        cell = layer_at[row.layer], column_at[row.step]
        loads = row.counts.sum(axis=0)
        loads_LDE[cell[0], drift_at[row.step]] += loads
        before_P = loads.reshape(P, E // P).sum(axis=1)
        before = imbalance(before_P)
        after = imbalance(move_loans(before_P, row.lent, E)) if len(row.lent) else before
        sums[0][cell] += before
        sums[1][cell] += after
        # Of equally bad ones the earliest: rows may come in any order.
        place = (row.step, row.micro_batch, row.layer, row.group)
        if (before, *(-n for n in place)) > (worst[0][cell], *(-places[cell]).tolist()):
            worst[0][cell], places[cell] = before, place
        worst[1][cell] = max(worst[1][cell], after)
        rows[cell] += 1
        on_row()
    mean = sums / np.maximum(rows, 1)
    return Gathered(
        layers=layers,
        columns=columns,
        rows=rows,
        mean_before=mean[0],
        worst_before=worst[0],
        mean_after=mean[1],
        worst_after=worst[1],
        worst=np.where(rows > 0, find_rows(recording, places.reshape(-1, 4)).reshape(L, C), -1),
        drift_columns=drift_columns,
        expert_loads=loads_LDE,
    )


def imbalance(loads_P: np.ndarray) -> float:
    """Largest / mean load; 1.0 without tokens."""
    total = int(loads_P.sum())
    return int(loads_P.max()) * len(loads_P) / total if total else 1.0


def move_loans(before_P: np.ndarray, lent: np.ndarray, num_experts: int) -> np.ndarray:
    """Loads of ranks [P] once loans [N, 3] (expert, borrower, pairs) have moved pairs."""
    after = before_P.copy()
    experts_per_rank = num_experts // len(before_P)
    for expert, borrower, pairs in lent.tolist():
        after[expert // experts_per_rank] -= pairs
        after[borrower] += pairs
    return after


def find_rows(recording: Recording, places: np.ndarray) -> np.ndarray:
    """Which of the recording's rows are at places [n, 4]; they must be there, or be zeros."""
    sizes = recording.places.max(axis=0).astype(np.int64) + 1
    factors = np.array([sizes[1] * sizes[2] * sizes[3], sizes[2] * sizes[3], sizes[3], 1])
    return np.searchsorted(recording.places.astype(np.int64) @ factors, places @ factors)
