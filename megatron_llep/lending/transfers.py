"""Which parts of which experts one rank sends to whom, and gets from whom, under one plan.

Letters: P ranks of the expert-parallel group, M native experts a rank, W numbers in one expert's
gradients or units in its parcel (see `lending.parcel`). The same plan at another W has the same
pieces in the same order, cut elsewhere.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from megatron_llep.planner import Plan, compiled


class Piece(NamedTuple):
    """A part of one expert's W numbers, on its way."""

    peer: int
    """The rank it goes to or comes from."""
    expert: int
    """Which expert on this rank: a native one (0..M-1) where it is at home, else a foreign slot."""
    start: int
    """First of the expert's numbers."""
    stop: int
    """After the last."""


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """One rank's part of one all-to-all; gradients take it the other way."""

    sends: tuple[Piece, ...]
    """By peer, in the order of the buffer that is sent."""
    receives: tuple[Piece, ...]
    """By peer, likewise."""

    def reverse(self) -> "Exchange":
        """What was sent is received, and the other way round."""
        return Exchange(sends=self.receives, receives=self.sends)


@dataclass(frozen=True, kw_only=True)
class RankTransfers:
    """One rank's part of a plan's transfers.

    First every home sends whole experts, or parts of those that several ranks put together; then,
    if there are such experts in the plan, for any rank, these exchange what they have, between
    nodes and inside them.
    """

    exchanges: tuple[Exchange, ...]
    """One to three; as many on every rank. The pieces of all but the first are between foreign
    slots."""
    num_foreign: int
    """Experts this rank borrows; slots are in the order of the experts."""

    @classmethod
    def of(
        cls, plan: Plan, rank: int, *, width: int, scatter_from: int, node_size: int
    ) -> "RankTransfers":
        """The part of `rank` in the transfers of the plan.

        Args:
            plan: the same on every rank.
            rank: 0 .. P-1.
            width: W.
            scatter_from: borrowers, or nodes, from which on an expert goes in shards; 0: none does.
            node_size: ranks on a node; divides P.
        """
        pieces = list_pieces(plan, width, scatter_from, node_size)
        first_native = rank * plan.experts_per_rank
        foreign = plan.foreign_experts[rank]
        foreign = foreign[foreign >= 0]
        exchanges = []
        for number in range(int(pieces[:, 0].max(initial=0)) + 1):
            of_exchange = pieces[pieces[:, 0] == number]
            if number and not len(of_exchange):
                continue
            ways = []
            for mine, theirs in ((1, 2), (2, 1)):
                rows = of_exchange[of_exchange[:, mine] == rank]
                rows = rows[np.lexsort((rows[:, 4], rows[:, 3], rows[:, theirs]))]
                experts = np.searchsorted(foreign, rows[:, 3])
                if number == 0 and mine == 1:
                    experts = rows[:, 3] - first_native
                columns = np.column_stack((rows[:, theirs], experts, rows[:, 4:]))
                ways.append(tuple(Piece(*row) for row in columns.tolist()))
            exchanges.append(Exchange(sends=ways[0], receives=ways[1]))
        return cls(exchanges=tuple(exchanges), num_foreign=len(foreign))


def list_pieces(plan: Plan, width: int, scatter_from: int, node_size: int) -> np.ndarray:
    """All pieces of all ranks, int64 [pieces, 6]: see `planner.loops.pieces`."""
    run = compiled("pieces.list_pieces")
    return run(plan.transfers, width, scatter_from, node_size, plan.num_experts)


def find_lent(plan: Plan, rank: int) -> list[int]:
    """Native experts (0..M-1) that a rank lends, ascending."""
    first = rank * plan.experts_per_rank
    return sorted({expert - first for expert, home, _ in plan.transfers.tolist() if home == rank})
