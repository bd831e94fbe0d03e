"""The workloads by name: which share of a layer's (token, expert) pairs each expert gets.

Shape letters: P ranks, E experts, M = E / P experts native to a rank, T tokens of a rank, K experts
per token (top_k).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of one layer."""

    num_ranks: int
    """P."""
    num_experts: int
    """E."""
    tokens_per_rank: int
    """T; ragged workloads have fewer on some ranks."""
    top_k: int
    """K."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """How tokens are routed. What is random follows from seed, step and rank alone."""

    name: str
    summary: str
    make_shares: Callable[[Sizes, np.random.Generator, int], np.ndarray]
    """(sizes, generator of the seed, step) -> float [E], the share of the pairs of each expert,
    the same for all ranks."""
    noisy: bool = False
    """Each rank draws its pairs from the shares; otherwise it has the shares, to one pair."""
    count_tokens: Callable[[Sizes, np.random.Generator, int], int] | None = None
    """(sizes, generator of the rank, rank) -> tokens of the rank; None: T on all."""


def _make_balanced(sizes: Sizes, rng: np.random.Generator, step: int) -> np.ndarray:
    return np.ones(sizes.num_experts)


def _heat(sizes: Sizes, hot: np.ndarray, share: float) -> np.ndarray:
    """Give the hot experts `share` of the pairs, evenly, and the others the rest.

    A token cannot choose an expert twice. With fewer than K hot experts, `share` of the tokens
    choose each of them, and others besides.
    """
    E, K, H = sizes.num_experts, sizes.top_k, len(hot)
    if E <= H:
        raise ValueError(f"{H} hot experts of {E}: use a workload with fewer, or more experts")
    of_pairs = share * min(H, K) / K
    shares = np.full(E, (1 - of_pairs) / (E - H))
    shares[hot] = of_pairs / H
    return shares


def _heat_rank(sizes: Sizes, rank: int, share: float) -> np.ndarray:
    """Give the experts of one rank `share` of the pairs, and all experts the rest."""
    E, M = sizes.num_experts, sizes.num_experts // sizes.num_ranks
    shares = np.full(E, (1 - share) / E)
    shares[rank * M : (rank + 1) * M] += share / M
    return shares


def make_hot(percent: int, hot: int) -> Workload:
    """`percent` of the tokens into `hot` experts, from expert 0 on: as hot-30-4 in `WORKLOADS`."""

    def make_shares(sizes: Sizes, rng: np.random.Generator, step: int) -> np.ndarray:
        return _heat(sizes, np.arange(hot), percent / 100)

    return Workload(
        name=f"hot-{percent}-{hot}",
        summary=f"{percent}% of the tokens into {hot} expert{'s' * (hot > 1)}, from expert 0 on",
        make_shares=make_shares,
    )


def _make_hot_rank(sizes: Sizes, rng: np.random.Generator, step: int) -> np.ndarray:
    return _heat_rank(sizes, int(rng.integers(sizes.num_ranks)), 0.5)


def _make_hot_spread(sizes: Sizes, rng: np.random.Generator, step: int) -> np.ndarray:
    return _heat(sizes, np.arange(4) * sizes.num_experts // 4, 0.5)


def _make_zipf(sizes: Sizes, rng: np.random.Generator, step: int) -> np.ndarray:
    return rng.permutation(1 / np.arange(1, sizes.num_experts + 1))


def _make_lognormal(sigma: float) -> Callable[[Sizes, np.random.Generator, int], np.ndarray]:
    def make_shares(sizes: Sizes, rng: np.random.Generator, step: int) -> np.ndarray:
        return rng.lognormal(sigma=sigma, size=sizes.num_experts)

    return make_shares


def _make_idle_experts(sizes: Sizes, rng: np.random.Generator, step: int) -> np.ndarray:
    busy = max(sizes.num_experts // 2, sizes.top_k)
    return rng.permutation(np.arange(sizes.num_experts) < busy).astype(float)


def _make_rotating(sizes: Sizes, rng: np.random.Generator, step: int) -> np.ndarray:
    E, P = sizes.num_experts, sizes.num_ranks
    first = (int(rng.integers(P)) + step) % P * (E // P)
    return _heat(sizes, np.arange(first, first + 4) % E, 0.5)


def _make_burst(sizes: Sizes, rng: np.random.Generator, step: int) -> np.ndarray:
    if step % 8 != 7:
        return np.ones(sizes.num_experts)
    return _heat_rank(sizes, int(rng.integers(sizes.num_ranks)), 0.8)


def _count_ragged(sizes: Sizes, rng: np.random.Generator, rank: int) -> int:
    return int(rng.integers(sizes.tokens_per_rank + 1))


def _count_idle(sizes: Sizes, rng: np.random.Generator, rank: int) -> int:
    return sizes.tokens_per_rank if rank % 2 == 0 else 0


_GRID = [make_hot(percent, hot) for hot in (16, 4, 1) for percent in (30, 50, 80, 95)]

_OTHERS = [
    Workload(
        name="balanced",
        summary="every expert gets the same",
        make_shares=_make_balanced,
    ),
    Workload(
        name="hot-rank",
        summary="50% of the pairs into the experts of one rank, the rest evenly over all",
        make_shares=_make_hot_rank,
    ),
    Workload(
        name="hot-spread",
        summary="50% of the tokens into 4 experts, evenly spread over the ranks",
        make_shares=_make_hot_spread,
    ),
    Workload(
        name="zipf",
        summary="popularity 1 / place, places shuffled; each rank draws",
        make_shares=_make_zipf,
        noisy=True,
    ),
    Workload(
        name="lognormal-1",
        summary="log-normal popularity, sigma 1; each rank draws",
        make_shares=_make_lognormal(1.0),
        noisy=True,
    ),
    Workload(
        name="lognormal-2",
        summary="log-normal popularity, sigma 2; each rank draws",
        make_shares=_make_lognormal(2.0),
        noisy=True,
    ),
    Workload(
        name="ragged",
        summary="lognormal-1, and each rank has between no tokens and all",
        make_shares=_make_lognormal(1.0),
        noisy=True,
        count_tokens=_count_ragged,
    ),
    Workload(
        name="idle-experts",
        summary="half of the experts get no token, the others the same",
        make_shares=_make_idle_experts,
    ),
    Workload(
        name="idle-ranks",
        summary="lognormal-1, and every second rank has no token of its own",
        make_shares=_make_lognormal(1.0),
        noisy=True,
        count_tokens=_count_idle,
    ),
    Workload(
        name="rotating",
        summary="hot-50-4, one rank further every step",
        make_shares=_make_rotating,
    ),
    Workload(
        name="burst",
        summary="balanced, but every eighth step hot-rank with 80%",
        make_shares=_make_burst,
    ),
]

WORKLOADS: dict[str, Workload] = {workload.name: workload for workload in _OTHERS + _GRID}

PAPER_GRID: tuple[str, ...] = tuple(workload.name for workload in _GRID)
"""The skews that the LLEP paper measures, hot experts first."""
