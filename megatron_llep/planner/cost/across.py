"""What crosses between nodes in one layer under a plan, in bytes, forward and backward.

Shape letters: P ranks on N nodes, E experts.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from megatron_llep.planner.cost.traffic import count_lending, count_tokens

if TYPE_CHECKING:  # the planners import the cost model
    from megatron_llep.planner.cost.model import LayerShape
    from megatron_llep.planner.plan import Plan
    from megatron_llep.planner.topology import Topology


@dataclass(frozen=True, kw_only=True, eq=False)
class NodeBytes:
    """What each node sends, and what it receives, [2, N]."""

    tokens: np.ndarray
    """With their gradients: four exchanges."""
    experts: np.ndarray
    """Weights, as often as they are lent, and gradients."""

    @property
    def total(self) -> float:
        """All that crosses, once."""
        return float((self.tokens + self.experts)[0].sum())

    @property
    def busiest(self) -> float:
        """Of one direction of the busiest node's link."""
        return float((self.tokens + self.experts).max())


def count_node_bytes(
    plan: "Plan", counts: np.ndarray, shape: "LayerShape", topology: "Topology"
) -> NodeBytes:
    """Count it, of tokens that stay on their rank first, then in their node.

    Args:
        plan: made from the counts.
        counts: integers [P, E].
        shape: of the layer.
        topology: which ranks share a node; with one node nothing crosses.
    """
    size = topology.node_size(plan.num_ranks)
    if size == plan.num_ranks:
        return NodeBytes(tokens=np.zeros((2, 1)), experts=np.zeros((2, 1)))
    per_node = (2, -1, size)
    pairs = count_tokens(plan, counts, topology)[1].reshape(per_node).sum(axis=2)
    traffic = count_lending(plan, shape.expert_weights, shape.scatter_from, topology)
    numbers = np.sum([each.numbers[1] for each in traffic], axis=0)
    numbers = numbers.reshape(per_node).sum(axis=2)
    weights = shape.weight_bytes * (1 + shape.refetch) * numbers
    # Two exchanges of tokens go one way and two the other; gradients go back.
    return NodeBytes(
        tokens=2 * shape.token_bytes * (pairs + pairs[::-1]),
        experts=weights + shape.bytes_per_gradient * numbers[::-1],
    )
