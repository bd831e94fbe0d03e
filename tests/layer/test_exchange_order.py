"""The token exchange is launched before the weights', on every rank, whether or not it lends."""

from dataclasses import replace

import pytest
import torch

from layer.test_layer_float64 import H, T, build_layer
from megatron_llep.integration.convert import convert_model
from support.chaos import watch_collectives
from support.layout import Layout, use_layout
from support.llep import EAGER
from support.ranks import run_ranks

TOKENS, WEIGHTS = "tokens", "weights"
GROUPS = {"EXPERT_MODEL_PARALLEL_GROUP": TOKENS, "LLEP_LENDING": WEIGHTS}
OVERLAPPED = {"moe_shared_expert_intermediate_size": 16, "moe_shared_expert_overlap": True}
SETTINGS = {"scatter_from": 0, "foreign_weights": "keep"}


def list_exchanges(rank, size, config):
    """The exchanges of a forward and its backward, of a layer that lends and one that does not."""
    found = []
    with use_layout(Layout(ep=2)):
        for threshold in (1.0, 1e9):
            layer = build_layer(Layout(ep=2), rank, 1.0, **config)
            convert_model([layer], replace(EAGER, imbalance_threshold=threshold, **SETTINGS))
            hidden = torch.rand(T, 1, H, dtype=torch.float64, requires_grad=True)
            with watch_collectives() as calls:
                output, _ = layer(hidden)
                output.sum().backward()
            found.append(
                [
                    GROUPS[desc]
                    for name, desc, _ in calls
                    if "alltoall" in name or "all_to_all" in name
                ]
            )
    return found


@pytest.mark.parametrize("config", [{}, OVERLAPPED], ids=["plain", "overlapped shared experts"])
def test_tokens_go_first(config):
    # Tokens, their probabilities, combined rows; and the same in backward.
    not_lending = [TOKENS] * 6
    lending = [TOKENS, WEIGHTS, TOKENS, TOKENS] * 2
    assert run_ranks(list_exchanges, 2, config) == [[lending, not_lending]] * 2
