"""What the plans of a recorded training move between two nodes, a step."""

from collections.abc import Sequence
from pathlib import Path

from megatron_llep.offline.recording import Recording
from megatron_llep.offline.simulator.models import model_of_recording
from megatron_llep.planner import Topology, plan_from_quota
from megatron_llep.planner.cost.across import count_node_bytes
from megatron_llep.planner.plan import native_quota


def predict_bytes(
    recording: Path, ranks_per_node: int, steps: Sequence[int], *, lends: bool
) -> float:
    """Bytes that cross in a step for the experts' sake: tokens, weights, gradients.

    Args:
        recording: of a training with LLEP.
        ranks_per_node: of two nodes.
        steps: that count.
        lends: as it ran; else as plain expert parallelism routes the same tokens.
    """
    topology = Topology(ranks_per_node=ranks_per_node)
    found = Recording.open(recording)
    shape = model_of_recording(found).layer
    total = 0.0
    for row in found.read():
        if row.step in steps:
            plan = row.plan
            if not lends:
                plan = plan_from_quota(native_quota(row.counts.sum(axis=0), len(row.counts)))
            total += count_node_bytes(plan, row.counts, shape, topology).total
    return total / len(steps)
