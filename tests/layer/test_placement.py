"""Placement: every (token, expert) pair lands once, in a slot that holds its expert."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_llep.placement import place_tokens
from megatron_llep.planner import ORDERS, list_exchange, make_plan, plan_from_quota, sends
from support.slots import slot_of_expert


@st.composite
def routings(draw):
    """Routing maps of every rank, bool [T, E], with a planner and an order of assignment."""
    P = draw(st.sampled_from([2, 4, 8]))
    M = draw(st.integers(1, 6))
    K = draw(st.integers(1, min(4, P * M)))
    seed = draw(st.integers(0, 2**31))
    skew = draw(st.floats(0, 4))
    generator = np.random.default_rng(seed)
    popularity = skew * generator.standard_normal(P * M)
    maps = []
    for _ in range(P):
        T = int(generator.integers(0, 40))
        score = popularity + generator.gumbel(size=(T, P * M))
        routing_map = np.zeros((T, P * M), dtype=bool)
        np.put_along_axis(routing_map, np.argsort(-score, axis=1)[:, :K], True, axis=1)
        maps.append(torch.from_numpy(routing_map))
    return maps, draw(st.sampled_from(["exact", "lla"])), draw(st.sampled_from(ORDERS))


def make_some_plan(maps, planner):
    counts = np.stack([routing_map.sum(0).numpy() for routing_map in maps])
    plan = make_plan(counts, planner=planner, imbalance_threshold=1.0, min_tokens_per_gemm=1)
    return counts, plan


@settings(max_examples=150, deadline=None, derandomize=True)
@given(routings())
def test_every_pair_lands_once_in_a_slot_of_its_expert(case):
    maps, planner, order = case
    counts, plan = make_some_plan(maps, planner)
    slots = plan.experts_per_rank + plan.max_foreign
    slot_expert = invert(slot_of_expert(plan), slots)
    received = np.zeros_like(plan.quota)
    for source, routing_map in enumerate(maps):
        to_ranks = sends(plan, counts, source, order)
        chunks, *_ = list_exchange(plan, counts, source, order)
        placement = place_tokens(routing_map, chunks)
        token, pair = placement.token_index, placement.pair_index

        assert sorted(pair.tolist()) == routing_map.reshape(-1).nonzero().flatten().tolist()
        assert torch.equal(pair // plan.num_experts, token)
        # What a rank receives is cut by slot, in this order; so is what is sent.
        sent = np.zeros((plan.num_ranks, slots), dtype=np.int64)
        rank, expert = np.nonzero(to_ranks.T)
        sent[rank, slot_of_expert(plan)[rank, expert]] = to_ranks[expert, rank]
        expected = np.repeat(slot_expert.reshape(-1), sent.reshape(-1))
        assert (pair % plan.num_experts).tolist() == expected.tolist()
        received += to_ranks
        # Within one slot, in token order: the experts see what they see under plain EP.
        bounds = np.cumsum(sent.reshape(-1))
        for piece in np.split(token.numpy(), bounds):
            assert (np.diff(piece) > 0).all()
    assert np.array_equal(received, plan.quota)


def invert(slot_of: np.ndarray, slots: int) -> np.ndarray:
    """[P, slots] expert in each slot, -1 where there is none, from [P, E]."""
    expert_in = np.full((len(slot_of), slots), -1)
    rank, expert = np.nonzero(slot_of >= 0)
    expert_in[rank, slot_of[rank, expert]] = expert
    return expert_in


@settings(max_examples=100, deadline=None, derandomize=True)
@given(routings())
def test_local_first_never_crosses_more_than_rank_order(case):
    maps, planner, _ = case
    counts, plan = make_some_plan(maps, planner)

    def crossing(order):
        total = 0
        for source in range(plan.num_ranks):
            to_ranks = sends(plan, counts, source, order)
            total += to_ranks.sum() - to_ranks[:, source].sum()
        return total

    assert crossing("local_first") <= crossing("rank_order")


def test_a_plain_plan_orders_pairs_as_megatron_does():
    routing_map = torch.tensor([[1, 0, 1, 0], [0, 1, 1, 0], [1, 0, 0, 1]], dtype=torch.bool)
    counts = np.stack([routing_map.sum(0).numpy()] * 2)
    plan = make_plan(counts, planner="exact", imbalance_threshold=9.0)
    chunks, *_ = list_exchange(plan, counts, 0)
    placement = place_tokens(routing_map, chunks)
    assert placement.token_index.tolist() == [0, 2, 1, 0, 1, 2]
    assert placement.pair_index.tolist() == [0, 8, 5, 2, 6, 11]


def test_a_plan_that_sends_to_a_rank_without_the_expert_is_caught():
    plan = plan_from_quota(np.array([[3, 1], [0, 2]]))
    plan = replace(plan, foreign_experts=np.full_like(plan.foreign_experts, -1))
    with pytest.raises(AssertionError, match="does not hold"):
        list_exchange(plan, np.array([[3, 1], [1, 1]]), 1)
