"""Experts in a latent size: tokens and lent weights have it, routers and shared experts do not.

Megatron projects with a linear layer of Transformer Engine; here torch's stands in for it.
"""

import torch
from megatron.core.transformer.moe import moe_layer

from support.layout import Layout
from support.parity import Case, compare_all
from support.routing import Routing
from support.training import Run


class Projection(torch.nn.Linear):
    """Takes what Megatron gives `TELinear`, and returns an output and no bias."""

    def __init__(self, input_size, output_size, *, config, init_method, bias, **_):
        super().__init__(input_size, output_size, bias=bias)

    def forward(self, hidden):
        return super().forward(hidden), None


def test_latent_experts(monkeypatch):
    monkeypatch.setattr(moe_layer, "HAVE_TE", True)
    monkeypatch.setattr(moe_layer, "TELinear", Projection)
    latent = {"moe_latent_size": 8}
    settings = {
        "alone": latent,
        "shared experts": latent | {"moe_shared_expert_intermediate_size": 32},
        "recomputed": latent | {"recompute_granularity": "selective", "recompute_modules": ["moe"]},
    }
    compare_all(
        {
            name: Case(Run(layout=Layout(ep=2), routing=Routing("hot"), config=config))
            for name, config in settings.items()
        }
    )
