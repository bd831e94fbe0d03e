"""Which parts of which experts one rank sends to whom, and gets from whom, under one plan.

Letters: P ranks of the expert-parallel group, M native experts a rank, W numbers in one expert's
gradients or units in its parcel (see `lending.parcel`). The same plan at another W has the same
pieces in the same order, cut elsewhere.
"""

from collections import Counter
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import NamedTuple

from megatron_llep.lending.fan_out import cut_shards, travel_in_shards
from megatron_llep.planner import Plan


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

    First every home sends whole experts, and shards of those that have many borrowers; if there
    are such experts in the plan, for any rank, borrowers then exchange shards.
    """

    exchanges: tuple[Exchange, ...]
    """One or two; as many on every rank. The pieces of the second are between foreign slots."""
    num_foreign: int
    """Experts this rank borrows; slots are in the order of the experts."""

    @classmethod
    def of(cls, plan: Plan, rank: int, *, width: int, scatter_from: int) -> "RankTransfers":
        """The part of `rank` in the transfers of the plan.

        Args:
            plan: the same on every rank.
            rank: 0 .. P-1.
            width: W.
            scatter_from: borrowers from which on an expert goes in shards; 0: none does.
        """
        transfers = plan.transfers.tolist()
        in_shards = _find_in_shards(plan, scatter_from)

        @cache
        def shards_of(e: int) -> dict[int, tuple[int, int]]:
            """What its home sends of expert e, from and to, to each of its borrowers."""
            borrowers = [borrower for expert, _, borrower in transfers if expert == e]
            cuts = cut_shards(width, len(borrowers))
            return dict(zip(borrowers, pairwise(cuts), strict=True))

        def part_of(e: int, holder: int) -> tuple[int, int]:
            return shards_of(e)[holder] if e in in_shards else (0, width)

        out = [(e, borrower) for e, home, borrower in transfers if home == rank]
        into = [(e, home) for e, home, borrower in transfers if borrower == rank]
        first_native = rank * plan.experts_per_rank
        first = Exchange(
            sends=tuple(Piece(to, e - first_native, *part_of(e, to)) for e, to in out),
            receives=tuple(
                Piece(source, slot, *part_of(e, rank)) for slot, (e, source) in enumerate(into)
            ),
        )
        if not in_shards:
            return cls(exchanges=(first,), num_foreign=len(into))
        shared = sorted(
            (peer, slot, e)
            for slot, (e, _) in enumerate(into)
            if e in in_shards
            for peer in shards_of(e)
            if peer != rank
        )
        second = Exchange(
            sends=tuple(Piece(peer, slot, *part_of(e, rank)) for peer, slot, e in shared),
            receives=tuple(Piece(peer, slot, *part_of(e, peer)) for peer, slot, e in shared),
        )
        return cls(exchanges=(first, second), num_foreign=len(into))


def find_lent(plan: Plan, rank: int) -> list[int]:
    """Native experts (0..M-1) that a rank lends, ascending."""
    first = rank * plan.experts_per_rank
    return sorted({expert - first for expert, home, _ in plan.transfers.tolist() if home == rank})


def has_shards(plan: Plan, scatter_from: int) -> bool:
    """Whether some expert goes in shards, so that there is a second exchange, for all ranks."""
    return bool(_find_in_shards(plan, scatter_from))


def _find_in_shards(plan: Plan, scatter_from: int) -> set[int]:
    """Experts that go in shards."""
    num_borrowers = Counter(plan.transfers[:, 0].tolist())
    return {e for e, number in num_borrowers.items() if travel_in_shards(number, scatter_from)}
