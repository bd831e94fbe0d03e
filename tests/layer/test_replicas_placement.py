"""Placement over replicas: every (token, expert) pair lands once, in a slot that holds it."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_llep.placement import place_tokens
from megatron_llep.planner import list_exchange, plan_over_replicas, sends
from support.slots import slot_of_expert


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    D=st.integers(1, 3),
    P=st.integers(1, 4),
    M=st.integers(1, 4),
    planner=st.sampled_from(["lp", "exact"]),
    seed=st.integers(0, 10_000),
)
def test_every_pair_lands_once_in_a_slot_of_its_expert(D, P, M, planner, seed):
    E, num_ranks = P * M, D * P
    generator = np.random.default_rng(seed)
    # Each row has favourites of its own, so that tokens change rows.
    favours = np.repeat(generator.random((D, E)) ** 3, P, axis=0)
    maps = [
        torch.from_numpy(generator.random((int(generator.integers(0, 30)), E)) < favour)
        for favour in favours
    ]
    counts = np.stack([routing_map.sum(0).numpy() for routing_map in maps])
    plan, spread = plan_over_replicas(
        counts, num_replicas=D, num_ranks=num_ranks, planner=planner, imbalance_threshold=1.0
    )
    slots = plan.experts_per_rank + plan.max_foreign
    slot_of = slot_of_expert(plan)
    for source, routing_map in enumerate(maps):
        to_ranks = sends(plan, spread, source)
        chunks, *_ = list_exchange(plan, spread, source, num_replicas=D)
        placement = place_tokens(routing_map, chunks)
        pair = placement.pair_index
        assert sorted(pair.tolist()) == routing_map.reshape(-1).nonzero().flatten().tolist()
        assert torch.equal(pair // E, placement.token_index)
        # What a rank receives is cut by slot, in this order; so is what is sent.
        replica, rank = np.nonzero(to_ranks)
        order = np.argsort(rank * slots + slot_of[rank, replica])
        lengths = to_ranks[replica, rank][order]
        assert (pair % E).tolist() == np.repeat(replica[order] % E, lengths).tolist()
        for piece in np.split(placement.token_index.numpy(), np.cumsum(lengths)):
            assert (np.diff(piece) > 0).all()
