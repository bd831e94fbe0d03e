"""Workloads W0 to W7: which experts each token of a job chooses, in each step.

A routing follows from (workload, seed, step) and the sizes alone; no method has a part in it. Each
workload isolates one thing, after the names of Megatron-LM's pull request 7488. Numpy only.

Letters: P ranks, E experts, M = E / P of them at home on a rank, K experts of a token, T tokens of
a rank where all have as many, N = P * T tokens of all ranks.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

HEAT = 0.75
"""Part of all (token, expert) pairs that goes to what is hot."""
BURST_EVERY = 4
"""W7: steps from one burst to the next; the last of so many is one."""
LONGEST_TO_SHORTEST = 4
"""W4: tokens of the rank that has most / of the one that has least."""

# Numpy pads seeds with zeros: without a number in front, [seed] and [seed, 0] would be the same.
_OF_SEED, _OF_STEP = 11, 12


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of one layer and its input."""

    num_ranks: int
    """P."""
    num_experts: int
    """E."""
    top_k: int
    """K."""
    tokens: int
    """T, the mean of the ranks."""

    def __post_init__(self) -> None:
        """Reject sizes that no routing has.

        Raises:
            ValueError: names the flag, its value and the way out.
        """
        if self.num_ranks < 2:
            raise ValueError(f"--ep {self.num_ranks}: experts are on 2 ranks at least")
        if self.num_experts < 1 or self.num_experts % self.num_ranks:
            raise ValueError(
                f"--experts {self.num_experts}: must be a multiple of --ep {self.num_ranks}"
            )
        if not 1 <= self.top_k <= self.num_experts // 2:
            raise ValueError(
                f"--top-k {self.top_k}: must lie in 1 .. {self.num_experts // 2}, half of "
                f"--experts {self.num_experts}, so that some can be hot and others not"
            )
        if self.tokens < LONGEST_TO_SHORTEST:
            raise ValueError(
                f"--tokens {self.tokens}: must be {LONGEST_TO_SHORTEST} or more, as ragged ranks "
                "have down to a fraction of it"
            )


@dataclass(frozen=True, kw_only=True, eq=False)
class Routing:
    """Of all ranks' tokens, rank by rank."""

    experts: np.ndarray
    """int64 [N, K]; the experts of a row differ."""
    tokens_per_rank: np.ndarray
    """int64 [P]."""
    num_experts: int

    @property
    def starts(self) -> np.ndarray:
        """int64 [P + 1]: rank r has rows starts[r] .. starts[r + 1] - 1."""
        return np.concatenate(([0], np.cumsum(self.tokens_per_rank)))

    @property
    def sources(self) -> np.ndarray:
        """int64 [N], the rank of each token."""
        return np.repeat(np.arange(len(self.tokens_per_rank)), self.tokens_per_rank)

    @property
    def counts(self) -> np.ndarray:
        """int64 [P, E], pairs of each rank for each expert."""
        P, E = len(self.tokens_per_rank), self.num_experts
        cells = self.sources[:, None] * E + self.experts
        return np.bincount(cells.ravel(), minlength=P * E).reshape(P, E)

    @property
    def digest(self) -> str:
        """Of all choices: equal on machines that run the same logical workload."""
        numbers = np.concatenate((self.tokens_per_rank, self.experts.ravel()))
        return hashlib.sha256(numbers.astype("<i8").tobytes()).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Where pairs go, and how many tokens ranks have."""

    name: str
    summary: str
    make_shares: Callable[[Sizes, np.random.Generator, int], np.ndarray]
    """(sizes, generator of the seed, step) -> float [E], the pairs of each expert, to scale."""
    is_ragged: bool = False
    """Ranks have different numbers of tokens."""


def route(workload: str, sizes: Sizes, *, seed: int = 0, step: int = 0) -> Routing:
    """The experts of every token of a step.

    Args:
        workload: a name of `WORKLOADS`.
        sizes: of the layer.
        seed: 0 or more.
        step: 0 or more.

    Raises:
        ValueError: there is no such workload; seed or step is negative; the sizes do not fit.
    """
    if seed < 0 or step < 0:
        raise ValueError(f"--seed {seed}, step {step}: both must be 0 or more")
    kind = get_workload(workload)
    of_seed = np.random.default_rng([_OF_SEED, seed])
    # First, so that it does not depend on how many numbers the shares take.
    tokens = _count_tokens(kind, sizes, of_seed)
    shares = kind.make_shares(sizes, of_seed, step)
    return _deal(shares, tokens, sizes, np.random.default_rng([_OF_STEP, seed, step]))


def route_evenly(routing: Routing, *, seed: int = 0, step: int = 0) -> Routing:
    """Forced balance: the same tokens on every rank, and every expert has the same of them."""
    sizes = Sizes(
        num_ranks=len(routing.tokens_per_rank),
        num_experts=routing.num_experts,
        top_k=routing.experts.shape[1],
        tokens=int(routing.tokens_per_rank.mean()),
    )
    rng = np.random.default_rng([_OF_STEP, seed, step])
    return _deal(np.ones(routing.num_experts), routing.tokens_per_rank, sizes, rng)


def get_workload(name: str) -> Workload:
    """The workload of that name.

    Raises:
        ValueError: there is none; names all.
    """
    if name not in WORKLOADS:
        raise ValueError(f"--workloads {name}: is unknown; choose of {', '.join(WORKLOADS)}")
    return WORKLOADS[name]


def _count_tokens(kind: Workload, sizes: Sizes, rng: np.random.Generator) -> np.ndarray:
    """Tokens int64 [P] of the ranks, P * T in all."""
    P, T = sizes.num_ranks, sizes.tokens
    order = rng.permutation(P)
    if not kind.is_ragged:
        return np.full(P, T)
    return _share_out(np.linspace(1, LONGEST_TO_SHORTEST, P)[order], P * T)


def _deal(
    shares: np.ndarray, tokens: np.ndarray, sizes: Sizes, rng: np.random.Generator
) -> Routing:
    """Make rows that have these shares [E], and give them to ranks with so many tokens [P]."""
    K, N = sizes.top_k, int(tokens.sum())
    counts = _share_out(_cap(shares, K), N * K)
    order = rng.permutation(sizes.num_experts)
    # An expert's pairs are neighbours, N at most, and neighbours go to different rows.
    rows = np.repeat(order, counts[order]).reshape(K, N).T
    # Ranks take rows in turn, each as often as it has tokens: an expert's rows come from all.
    turns = np.concatenate([(np.arange(each) + 0.5) / max(each, 1) for each in tokens])
    sources = np.repeat(np.arange(len(tokens)), tokens)[np.argsort(turns, kind="stable")]
    order = np.lexsort((rng.permutation(N), sources))
    return Routing(experts=rows[order], tokens_per_rank=tokens, num_experts=sizes.num_experts)


def _cap(shares: np.ndarray, K: int) -> np.ndarray:
    """Shares [E] with sum 1 and none above 1/K, which is an expert in every row."""
    shares, most = shares / shares.sum(), 1 / K
    while (over := shares > most + 1e-12).any():
        rest = (shares > 0) & (shares < most)
        excess = (shares[over] - most).sum()
        shares[over] = most
        shares[rest] *= 1 + excess / shares[rest].sum()
    return shares


def _share_out(weights: np.ndarray, total: int) -> np.ndarray:
    """Integers [n] that sum to `total`, each its weight's part of it, to one."""
    exact = weights / weights.sum() * total
    whole = np.floor(exact + 1e-6).astype(np.int64)
    missing = total - int(whole.sum())
    # Rounded, so that what is equal but for rounding is given out in order.
    most_missed = np.argsort(-np.round(exact - whole, 6), kind="stable")
    whole[most_missed[:missing]] += 1
    return whole


def _heat(sizes: Sizes, hot: np.ndarray) -> np.ndarray:
    """`HEAT` of the pairs for the hot experts, the rest for the others."""
    shares = np.full(sizes.num_experts, (1 - HEAT) / (sizes.num_experts - len(hot)))
    shares[hot] = HEAT / len(hot)
    return shares


def _count_hot(sizes: Sizes) -> int:
    """Hot experts of W1 and W3: a quarter of all."""
    return max(sizes.num_experts // 4, sizes.top_k)


def _heat_rank(sizes: Sizes, rank: int) -> np.ndarray:
    M = sizes.num_experts // sizes.num_ranks
    return _heat(sizes, np.arange(rank * M, (rank + 1) * M))


def _make_balanced(sizes: Sizes, rng: np.random.Generator, step: int) -> np.ndarray:
    return np.ones(sizes.num_experts)


def _make_hot_set(sizes: Sizes, rng: np.random.Generator, step: int) -> np.ndarray:
    return _heat(sizes, np.arange(_count_hot(sizes)))


def _make_hot_rank(sizes: Sizes, rng: np.random.Generator, step: int) -> np.ndarray:
    return _heat_rank(sizes, int(rng.integers(sizes.num_ranks)))


def _make_spread(sizes: Sizes, rng: np.random.Generator, step: int) -> np.ndarray:
    P, M, hot = sizes.num_ranks, sizes.num_experts // sizes.num_ranks, np.arange(_count_hot(sizes))
    return _heat(sizes, hot % P * M + hot // P)


def _make_empty(sizes: Sizes, rng: np.random.Generator, step: int) -> np.ndarray:
    P, E = sizes.num_ranks, sizes.num_experts
    M, idle = E // P, int(rng.integers(P))
    expert = np.arange(E)
    shares = ((expert // M != idle) & (expert % 2 == 0)).astype(float)
    if (shares > 0).sum() < sizes.top_k:
        raise ValueError(
            f"--workloads W5: {int(shares.sum())} of {E} experts have tokens, fewer than "
            f"--top-k {sizes.top_k}; give more --experts, or leave W5 out"
        )
    return shares


def _make_rotating(sizes: Sizes, rng: np.random.Generator, step: int) -> np.ndarray:
    P, M = sizes.num_ranks, sizes.num_experts // sizes.num_ranks
    rank = (int(rng.integers(P)) + step) % P
    return _heat(sizes, np.array([rank * M + step // P % M]))


def _make_burst(sizes: Sizes, rng: np.random.Generator, step: int) -> np.ndarray:
    order = rng.permutation(sizes.num_experts)
    if step % BURST_EVERY != BURST_EVERY - 1:
        return np.ones(sizes.num_experts)
    return _heat(sizes, order[[step // BURST_EVERY % len(order)]])


WORKLOADS: dict[str, Workload] = {
    each.name: each
    for each in (
        Workload(
            name="W0", summary="balanced: every expert has the same", make_shares=_make_balanced
        ),
        Workload(
            name="W1",
            summary="hot experts: a quarter of the experts, side by side, has 75% of the pairs",
            make_shares=_make_hot_set,
        ),
        Workload(
            name="W2",
            summary="hot rank: the experts of one rank have 75%, each the same",
            make_shares=_make_hot_rank,
        ),
        Workload(
            name="W3",
            summary="spread heat: as many experts as in W1, as hot, dealt out to the ranks",
            make_shares=_make_spread,
        ),
        Workload(
            name="W4",
            summary="ragged sources: ranks have between 40% and 160% of the mean tokens",
            make_shares=_make_balanced,
            is_ragged=True,
        ),
        Workload(
            name="W5",
            summary="empty experts: none of one rank's has a token, and of others every second",
            make_shares=_make_empty,
        ),
        Workload(
            name="W6",
            summary="rotating: one expert has 75%, or is in every row if that is less; in each "
            "step another one, of the next rank, so that no placement by the past is right",
            make_shares=_make_rotating,
        ),
        Workload(
            name="W7",
            summary=f"burst: W0, but in every {BURST_EVERY}th step one expert is as hot as in W6, "
            "another one each time",
            make_shares=_make_burst,
        ),
    )
}
