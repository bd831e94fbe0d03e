"""Of each cell its worst micro-batch: loads of ranks, the busiest experts, and loans by method.

Shape letters: L MoE layers, C columns, P ranks, E experts, N loans.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from megatron_llep.offline.methods import plan_method
from megatron_llep.offline.recording import RecordedLayer, Recording
from megatron_llep.offline.recording.layout import list_loans
from megatron_llep.planner import Topology
from megatron_llep.planner.cost.model import LayerCost

RECORDED = "recorded"
"""The method that stands for what ran."""
TOP_EXPERTS = 12


def keep_details(
    recording: Recording,
    worst: np.ndarray,
    methods: Sequence[str],
    topology: Topology,
    cost: LayerCost | None,
    on_row: Callable[[], None] = lambda: None,
) -> list[list[Any] | None]:
    """Plan the worst rows under each method, and keep what a click shows.

    Args:
        recording: what they are of.
        worst: [L, C] numbers of rows, -1 for none.
        methods: of `METHODS`, and `RECORDED`.
        topology: of the P ranks.
        cost: for `auto`.
        on_row: called after each row, for a progress bar.

    Returns:
        For each cell, row by row, None or a list: step, micro-batch, group; loads of ranks before;
        experts and their pairs, busiest first; for each method which of the lists of loans is its;
        these lists of (expert, borrower, pairs), one after another, each once. Loads after follow.
    """
    cells = {number: at for at, number in enumerate(worst.ravel().tolist()) if number >= 0}
    found: dict[tuple[int, ...], list[Any]] = {}
    for row in recording.read(np.array(sorted(cells))):
        place = (row.step, row.micro_batch, row.layer, row.group)
        found[place] = _encode(row, methods, topology, cost)
        on_row()
    details: list[list[Any] | None] = [None] * worst.size
    for number, at in cells.items():
        details[at] = found[tuple(recording.places[number].tolist())]
    return details


def _encode(
    row: RecordedLayer, methods: Sequence[str], topology: Topology, cost: LayerCost | None
) -> list[Any]:
    """One cell's list."""
    P, E = row.counts.shape
    loads = row.counts.sum(axis=0)
    busiest = np.argsort(-loads, kind="stable")[:TOP_EXPERTS]
    busiest = busiest[loads[busiest] > 0]
    uses: list[int] = []
    loans: list[list[int]] = []
    for method in methods:
        if method == RECORDED:
            lent = row.lent
        else:
            lent = list_loans(plan_method(row.counts, method, topology, cost))
        # In one order, whoever wrote them, so that equal plans are kept once.
        flat: list[int] = lent[np.lexsort((lent[:, 1], lent[:, 0]))].ravel().tolist()
        if flat not in loans:
            loans.append(flat)
        uses.append(loans.index(flat))
    return [
        row.step,
        row.micro_batch,
        row.group,
        loads.reshape(P, E // P).sum(axis=1).tolist(),
        np.column_stack((busiest, loads[busiest])).ravel().tolist(),
        uses,
        loans,
    ]
