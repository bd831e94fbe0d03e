"""Bytes between nodes, of two nodes of one rank, by hand."""

import numpy as np
import pytest

from megatron_llep.planner import Topology, plan_from_quota
from megatron_llep.planner.cost.across import count_node_bytes
from megatron_llep.planner.cost.model import LayerShape

NODES = Topology(ranks_per_node=1)
COUNTS = np.array([[10, 30], [0, 0]])
TOKEN, WEIGHTS, GRADIENTS = 2 * 64, 2 * 3 * 64 * 64, 4 * 3 * 64 * 64
"""Bytes of each."""


def count(quota, **options):
    shape = LayerShape(hidden=64, ffn_hidden=64, num_experts=2, top_k=1, **options)
    return count_node_bytes(plan_from_quota(np.array(quota)), COUNTS, shape, NODES)


def test_plain_expert_parallelism():
    found = count([[10, 0], [0, 30]])
    assert found.total == found.busiest == 4 * 30 * TOKEN
    assert found.busiest_link == 2 * 30 * TOKEN


@pytest.mark.parametrize("refetch", [False, True])
def test_what_a_loan_adds(refetch):
    """Node 0 borrows expert 1 for 20 of its pairs: weights come against its tokens."""
    found = count([[10, 0], [20, 10]], refetch=refetch)
    lent = WEIGHTS * (1 + refetch) + GRADIENTS
    assert found.total == 4 * 10 * TOKEN + lent
    ways = [WEIGHTS, 10 * TOKEN, max(10 * TOKEN, refetch * WEIGHTS)]
    assert found.busiest == sum(ways) + GRADIENTS
    assert found.busiest_link == 2 * 10 * TOKEN + max(WEIGHTS * (1 + refetch), GRADIENTS)


def test_on_one_node_nothing_crosses():
    shape = LayerShape(hidden=64, ffn_hidden=64, num_experts=2, top_k=1)
    plan = plan_from_quota(np.array([[10, 0], [20, 10]]))
    found = count_node_bytes(plan, COUNTS, shape, Topology())
    assert found.total == found.busiest == found.busiest_link == 0
