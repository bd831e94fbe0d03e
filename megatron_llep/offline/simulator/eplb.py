"""Placement of replicas by recent loads, for comparison with lending.

The idea of DeepSeek's EPLB (deepseek-ai/EPLB): every rank has slots for more experts than its
share; the experts with most tokens per replica get the additional replicas, and the replicas,
heaviest first, go to the least loaded rank that has a slot. It is for inference: replicas stay for
many steps, and tokens of an expert are spread evenly over its replicas.

Shape letters: P ranks, E experts, N slots per rank.
"""

from heapq import heapify, heappop, heappush, heapreplace

import numpy as np


def place_replicas(loads: np.ndarray, num_ranks: int, slots: int) -> np.ndarray:
    """Fill all slots with replicas of the experts.

    Args:
        loads: [E] recent tokens of each expert.
        num_ranks: P.
        slots: N, at least E / P.

    Returns:
        int64 [E, P], replicas of each expert on each rank; a rank may hold several of one.

    Raises:
        ValueError: the slots do not hold all experts.
    """
    P, E = num_ranks, len(loads)
    if P * slots < E:
        raise ValueError(f"{slots} slots on each of {P} ranks cannot hold {E} experts")
    replicas = np.ones(E, dtype=np.int64)
    heaviest = [(-load, expert) for expert, load in enumerate(loads.tolist())]
    heapify(heaviest)
    for _ in range(P * slots - E):
        _, expert = heaviest[0]
        replicas[expert] += 1
        heapreplace(heaviest, (-float(loads[expert]) / int(replicas[expert]), expert))
    weight = loads / replicas
    placed = np.zeros((E, P), dtype=np.int64)
    ranks = [(0.0, rank, slots) for rank in range(P)]
    for expert in np.argsort(-weight, kind="stable"):
        for _ in range(replicas[expert]):
            load, rank, free = heappop(ranks)
            placed[expert, rank] += 1
            if free > 1:
                heappush(ranks, (load + float(weight[expert]), rank, free - 1))
    return placed


def spread_evenly(loads: np.ndarray, placed: np.ndarray) -> np.ndarray:
    """Quotas int64 [E, P] that split each expert's tokens evenly over its replicas [E, P]."""
    ends = np.cumsum(placed, axis=1)
    ends = loads[:, None] * ends // ends[:, -1:]
    return np.diff(ends, axis=1, prepend=0)
