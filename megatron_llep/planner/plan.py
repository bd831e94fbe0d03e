"""The result of planning one MoE layer for one micro-batch.

Shape letters: P ranks of the expert-parallel group, E experts, M = E / P experts native to a
rank, S foreign slots per rank in this plan, n transfers.
"""

import zlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from megatron_llep.planner.compiled import compiled


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """Which rank computes how many tokens of which expert. Arrays are int64 and read-only.

    Expert e is native to rank e // M; any other rank that computes some of its tokens holds it
    in a foreign slot for this micro-batch. Build a plan with `make_plan` or `plan_from_quota`.
    """

    quota: np.ndarray
    """[E, P] tokens of expert e that rank g computes; a row sums to the expert's load."""
    foreign_experts: np.ndarray
    """[P, S] experts in each rank's foreign slots, ascending, then -1 for the empty slots."""
    transfers: np.ndarray
    """[n, 3] rows (expert, home, borrower), sorted by home, then borrower, then expert."""
    is_fallback: bool
    """Nothing is lent: plain expert parallelism, every token is computed at its expert's home."""
    imbalance_before: float
    """Largest load of a rank / mean load under plain expert parallelism; 1.0 without tokens."""
    imbalance_after: float
    """The same under this plan."""

    @property
    def num_experts(self) -> int:
        """E."""
        return self.quota.shape[0]

    @property
    def num_ranks(self) -> int:
        """P."""
        return self.quota.shape[1]

    @property
    def experts_per_rank(self) -> int:
        """M, the native slots of a rank."""
        return self.num_experts // self.num_ranks

    @property
    def max_foreign(self) -> int:
        """S, the most foreign experts that any rank has; 0 when nothing is lent."""
        return self.foreign_experts.shape[1]

    @property
    def load_per_rank_before(self) -> np.ndarray:
        """[P] tokens per rank under plain expert parallelism."""
        return self.quota.sum(axis=1).reshape(self.num_ranks, self.experts_per_rank).sum(axis=1)

    @property
    def load_per_rank_after(self) -> np.ndarray:
        """[P] tokens per rank under this plan."""
        return self.quota.sum(axis=0)

    @cached_property
    def digest(self) -> int:
        """64 bits, signed, of loads and loans: equal where plans are, and hardly ever else."""
        loads = self.quota.sum(axis=1)
        expert, _, borrower = self.transfers.T
        lent = np.concatenate((self.transfers.ravel(), self.quota[expert, borrower]))
        number = zlib.crc32(loads.tobytes()) << 32 | zlib.crc32(lent.tobytes())
        return number - (number >> 63 << 64)

    def validate(self, counts: np.ndarray, max_foreign: int) -> None:
        """Check every invariant of a plan against the routing it was made for.

        Args:
            counts: [P, E] tokens that each rank routes to each expert.
            max_foreign: the bound on foreign experts per rank the plan was made with.

        Raises:
            ValueError: the first invariant that does not hold, with where it fails.
        """
        P, E = self.num_ranks, self.num_experts
        if counts.shape != (P, E):
            raise ValueError(f"plan is for [P, E] = [{P}, {E}], counts are {list(counts.shape)}")
        if (self.quota < 0).any():
            raise ValueError(f"negative quota at (expert, rank) {_first(self.quota < 0)}")
        off = self.quota.sum(axis=1) != counts.sum(axis=0)
        if off.any():
            raise ValueError(f"quotas of expert {_first(off)[0]} do not sum to its load")
        held = self.foreign_experts >= 0
        native = held & (self.foreign_experts // self.experts_per_rank == np.arange(P)[:, None])
        if native.any():
            raise ValueError(f"a foreign slot holds a native expert: (rank, slot) {_first(native)}")
        over = held.sum(axis=1) > max_foreign
        if over.any():
            raise ValueError(f"rank {_first(over)[0]} has more than {max_foreign} foreign experts")
        expected = plan_from_quota(self.quota)
        for name in ("foreign_experts", "transfers"):
            if not np.array_equal(getattr(self, name), getattr(expected, name)):
                raise ValueError(f"{name} do not follow from the quotas")
        for name in ("is_fallback", "imbalance_before", "imbalance_after"):
            if getattr(self, name) != getattr(expected, name):
                raise ValueError(
                    f"{name} is {getattr(self, name)}, the quotas give {getattr(expected, name)}"
                )


def plan_from_quota(quota: np.ndarray) -> Plan:
    """Derive slots, transfers and imbalances from the quotas alone.

    Args:
        quota: int64 [E, P], non-negative, P divides E. The plan keeps it and makes it read-only.
    """
    found = compiled("plan.read_quotas")(np.ascontiguousarray(quota, np.int64))
    return freeze_plan(quota, *found)


def freeze_plan(
    quota: np.ndarray,
    foreign_experts: np.ndarray,
    transfers: np.ndarray,
    total: int,
    before: int,
    after: int,
) -> Plan:
    """Build a plan of its tables, all tokens, and the largest load of a rank before and after."""
    P = quota.shape[1]
    for array in (quota, foreign_experts, transfers):
        array.setflags(write=False)
    return Plan(
        quota=quota,
        foreign_experts=foreign_experts,
        transfers=transfers,
        is_fallback=not len(transfers),
        imbalance_before=before * P / total if total else 1.0,
        imbalance_after=after * P / total if total else 1.0,
    )


def native_quota(loads: np.ndarray, num_ranks: int) -> np.ndarray:
    """Quotas of plain expert parallelism: [E, P] from loads [E], every token at its home."""
    E = len(loads)
    quota = np.zeros((E, num_ranks), dtype=np.int64)
    quota[np.arange(E), np.arange(E) // (E // num_ranks)] = loads
    return quota


def imbalance_of(rank_loads: list[int]) -> float:
    """Largest / mean of the loads [P]; 1.0 when all are zero."""
    total = sum(rank_loads)
    return max(rank_loads) * len(rank_loads) / total if total else 1.0


def _first(mask: np.ndarray) -> tuple[int, ...]:
    """Index of the first true element."""
    return tuple(int(i) for i in np.argwhere(mask)[0])
