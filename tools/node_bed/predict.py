"""What the plans of a recorded training move between two nodes, a step.

Letters: P ranks, E experts.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_llep.offline.recording import Recording
from megatron_llep.planner import Plan, Topology, plan_from_quota
from megatron_llep.planner.cost.model import EXCHANGES, LayerShape
from megatron_llep.planner.cost.traffic import count_lending, count_tokens
from megatron_llep.planner.plan import native_quota


def predict_bytes(
    recording: Path, shape: LayerShape, ranks_per_node: int, steps: Sequence[int], *, lends: bool
) -> float:
    """Bytes that cross in a step for the experts' sake: tokens, weights, gradients.

    Args:
        recording: of a training with LLEP.
        shape: of its layers.
        ranks_per_node: of two nodes.
        steps: that count.
        lends: as it ran; else as plain expert parallelism routes the same tokens.
    """
    topology = Topology(ranks_per_node=ranks_per_node)
    found = Recording.open(recording)
    total = 0.0
    for row in found.read():
        if row.step in steps:
            plan = row.plan
            if not lends:
                plan = plan_from_quota(native_quota(row.counts.sum(axis=0), len(row.counts)))
            total += _count(plan, row.counts, shape, topology)
    return total / len(steps)


def _count(plan: Plan, counts: np.ndarray, shape: LayerShape, topology: Topology) -> float:
    """Of one layer of one micro-batch, in both directions."""
    pairs = count_tokens(plan, counts, topology)[1, 0].sum()
    # Each row travels with its probability, both ways.
    moved = EXCHANGES * pairs * shape.token_bytes
    lent = count_lending(plan, shape.expert_weights, shape.scatter_from, topology)
    numbers = sum(int(each.numbers[1, 0].sum()) for each in lent)
    weights = numbers * shape.weight_bytes * (1 + shape.refetch)
    return float(moved + weights + numbers * shape.bytes_per_gradient)
