"""From a workload to counts, and to an expert choice for each token.

Shape letters: P ranks, E experts, T tokens of a rank, K experts per token (top_k).

A token chooses K *different* experts, as real routers do, so no expert can have more than T pairs
of a rank and a single one never more than 1/K of them. The LLEP paper's published benchmark
(test_llep.py of SalesforceAIResearch/LeastLoadedEP) lets a token choose one expert K times instead,
so that "95% into 1 expert" is 95% of the pairs whatever K is. To have that, ask for K * T tokens
with top_k=1.
"""

import numpy as np

from megatron_llep.offline.workloads.catalogue import WORKLOADS, Sizes, Workload

# Numpy pads seeds with zeros: without a number in front, [seed] and [seed, 0] would be the same.
_OF_SEED, _OF_RANK, _OF_TOKENS = 1, 2, 3


def get_workload(name: str) -> Workload:
    """The workload of that name.

    Raises:
        ValueError: there is none; names all.
    """
    if name not in WORKLOADS:
        raise ValueError(f"workload {name!r} is unknown: choose one of {', '.join(WORKLOADS)}")
    return WORKLOADS[name]


def make_counts(
    workload: str | Workload,
    *,
    num_ranks: int,
    num_experts: int,
    tokens_per_rank: int,
    top_k: int,
    seed: int = 0,
    step: int = 0,
) -> np.ndarray:
    """Tokens that each rank routes to each expert: int64 [P, E], the rows of `rank_counts`."""
    sizes = _check_sizes(num_ranks, num_experts, tokens_per_rank, top_k)
    if isinstance(workload, str):
        workload = get_workload(workload)
    shares = _make_shares(workload, sizes, seed, step)
    return np.stack([_draw_row(workload, sizes, shares, seed, step, r) for r in range(num_ranks)])


def rank_counts(
    workload: str | Workload,
    *,
    num_ranks: int,
    num_experts: int,
    tokens_per_rank: int,
    top_k: int,
    rank: int,
    seed: int = 0,
    step: int = 0,
) -> np.ndarray:
    """Tokens that one rank routes to each expert: int64 [E], none above the rank's tokens T.

    Args:
        workload: or its name in `WORKLOADS`.
        num_ranks: P, divides E.
        num_experts: E.
        tokens_per_rank: T, at least 0; ragged workloads have fewer on some ranks.
        top_k: K, 1 .. E.
        rank: 0 .. P-1.
        seed: at least 0.
        step: at least 0; some workloads change from step to step.

    Raises:
        ValueError: a size is out of range, or the workload does not fit the sizes.
    """
    sizes = _check_sizes(num_ranks, num_experts, tokens_per_rank, top_k)
    if not 0 <= rank < num_ranks:
        raise ValueError(f"rank={rank} must lie in 0 .. {num_ranks - 1}")
    if isinstance(workload, str):
        workload = get_workload(workload)
    return _draw_row(workload, sizes, _make_shares(workload, sizes, seed, step), seed, step, rank)


def route_tokens(
    workload: str | Workload,
    *,
    num_ranks: int,
    num_experts: int,
    tokens_per_rank: int,
    top_k: int,
    rank: int,
    seed: int = 0,
    step: int = 0,
) -> np.ndarray:
    """An expert choice that has the counts of `rank_counts`: int64 [T, K], rows without repeats.

    Arguments and errors are those of `rank_counts`.
    """
    counts = rank_counts(
        workload,
        num_ranks=num_ranks,
        num_experts=num_experts,
        tokens_per_rank=tokens_per_rank,
        top_k=top_k,
        rank=rank,
        seed=seed,
        step=step,
    )
    rng = np.random.default_rng([_OF_TOKENS, seed, step, rank])
    order = rng.permutation(num_experts)
    pairs = np.repeat(order, counts[order])
    # An expert's pairs are neighbours, T at most, and neighbours go to different tokens.
    choice = pairs.reshape(top_k, len(pairs) // top_k).T
    return choice[rng.permutation(len(choice))]


def _check_sizes(num_ranks: int, num_experts: int, tokens_per_rank: int, top_k: int) -> Sizes:
    if num_ranks < 1 or num_experts < 1 or num_experts % num_ranks:
        raise ValueError(
            f"{num_experts} experts do not divide over {num_ranks} ranks: use a multiple of "
            f"{max(num_ranks, 1)}"
        )
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k={top_k} must lie in 1 .. {num_experts}, the number of experts")
    if tokens_per_rank < 0:
        raise ValueError(f"tokens_per_rank={tokens_per_rank} must be at least 0")
    return Sizes(
        num_ranks=num_ranks,
        num_experts=num_experts,
        tokens_per_rank=tokens_per_rank,
        top_k=top_k,
    )


def _make_shares(workload: Workload, sizes: Sizes, seed: int, step: int) -> np.ndarray:
    """Float [E], sum 1, none above 1/K."""
    if seed < 0 or step < 0:
        raise ValueError(f"seed={seed} and step={step} must be at least 0")
    shares = workload.make_shares(sizes, np.random.default_rng([_OF_SEED, seed]), step)
    most = 1 / sizes.top_k
    shares = shares / shares.sum()
    while (over := shares > most + 1e-12).any():
        rest = (shares > 0) & ~over & (shares < most)
        excess = (shares[over] - most).sum()
        shares[over] = most
        shares[rest] *= 1 + excess / shares[rest].sum()
    return shares


def _draw_row(
    workload: Workload, sizes: Sizes, shares: np.ndarray, seed: int, step: int, rank: int
) -> np.ndarray:
    """Counts int64 [E] of one rank from the layer's shares [E]."""
    rng = np.random.default_rng([_OF_RANK, seed, step, rank])
    T = sizes.tokens_per_rank
    if workload.count_tokens is not None:
        T = workload.count_tokens(sizes, rng, rank)
    pairs = T * sizes.top_k
    if workload.noisy:
        counts = rng.multinomial(pairs, shares).astype(np.int64)
    else:
        counts = np.floor(shares * pairs + 1e-6).astype(np.int64)
    np.minimum(counts, T, out=counts)
    missing = pairs - int(counts.sum())
    while missing:
        room = rng.permutation(np.flatnonzero((counts < T) & (shares > 0)))[:missing]
        counts[room] += 1
        missing -= len(room)
    return counts
