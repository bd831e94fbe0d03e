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
    """What nodes send, and what they receive, in each exchange of a layer."""

    tokens: np.ndarray
    """[4, 2, N] in dispatch, combine, and the backward of combine and of dispatch."""
    experts: np.ndarray
    """[4, 2, N] beside each: weights with dispatch, and again with the backward of combine if they
    are fetched again; gradients with the backward of dispatch."""

    @property
    def total(self) -> float:
        """All that crosses, once."""
        return float((self.tokens + self.experts)[:, 0].sum())

    @property
    def busiest(self) -> float:
        """What a layer waits for: of each exchange the busiest direction of a node's link, summed.

        An exchange ends when that direction has carried its part, however idle the other was.
        """
        return float((self.tokens + self.experts).max(axis=(1, 2)).sum())

    @property
    def busiest_link(self) -> float:
        """What one direction of one node's link carries in all exchanges; the most of them."""
        return float((self.tokens + self.experts).sum(axis=0).max())


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
        nothing = np.zeros((4, 2, 1))
        return NodeBytes(tokens=nothing, experts=nothing)
    per_node = (2, -1, size)
    pairs = count_tokens(plan, counts, topology)[1].reshape(per_node).sum(axis=2)
    traffic = count_lending(plan, shape.expert_weights, shape.scatter_from, topology)
    numbers = np.sum([each.numbers[1] for each in traffic], axis=0)
    numbers = numbers.reshape(per_node).sum(axis=2)
    weights, gradients = shape.weight_bytes * numbers, shape.bytes_per_gradient * numbers[::-1]
    # Tokens go back from combine, and their gradients go there from its backward.
    there, back = shape.token_bytes * pairs, shape.token_bytes * pairs[::-1]
    return NodeBytes(
        tokens=np.stack([there, back, there, back]),
        experts=np.stack([weights, 0 * weights, shape.refetch * weights, gradients]),
    )
