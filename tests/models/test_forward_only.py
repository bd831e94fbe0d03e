"""Forward alone: evaluation and `no_grad`, before and between training steps.

Shape letters: b = micro-batch size, s = sequence length.
"""

from dataclasses import replace

import pytest
import torch

from megatron_llep.integration.convert import convert_model
from megatron_llep.layer import LLEPMoELayer
from megatron_llep.placement.forward import Planned
from support.comparison import get_relative_difference
from support.layout import Layout, use_layout
from support.llep import EAGER, note_decisions
from support.ranks import run_ranks
from support.routing import Routing, force_routing
from support.training import Run, build_model, make_config, make_tokens

RUN = Run(
    layout=Layout(ep=2),
    routing=Routing("hot"),
    config={"hidden_dropout": 0.5, "moe_router_dtype": "fp32"},
)


def compute_loss(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Token losses [b, s]."""
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    return model(inputs, torch.arange(inputs.shape[1]).expand_as(inputs), None, labels=labels)


def see_all_modes(rank: int, llep=None) -> list[torch.Tensor]:
    """Losses in evaluation, without gradients, and in training; then the weights' gradients."""
    decisions: list[Planned] = []
    with use_layout(RUN.layout):
        (model,) = build_model(make_config(RUN), RUN)
        if llep is not None:
            note_decisions(convert_model([model], llep), decisions)
        force_routing([model], RUN.routing)
        seen = []
        for number, (training, with_grad) in enumerate(
            [(False, False), (True, True), (False, True), (True, False), (False, False)]
        ):
            torch.manual_seed(number)  # of dropout
            model.train(training)
            with torch.set_grad_enabled(with_grad):
                losses = compute_loss(model, make_tokens(RUN, number, rank))
            seen.append(losses.detach())
            if llep is not None:
                assert len(decisions) == 2 * (number + 1)  # 2 layers
                assert all(len(decision.plan.transfers) > 0 for decision in decisions)
            if with_grad:
                losses.mean().backward()
        # Without DDP, gradients go to autograd. An expert without a token has none.
        seen += [
            torch.zeros_like(weight) if weight.grad is None else weight.grad
            for weight in model.parameters()
        ]
        for layer in model.modules():
            if isinstance(layer, LLEPMoELayer):
                assert layer.shared_lending.memory.alive == 0, "foreign weights stay"
        return seen


@pytest.mark.parametrize("foreign_weights", ["keep", "refetch"])
def test_evaluation_and_no_grad(foreign_weights):
    def work(rank, size):
        plain = see_all_modes(rank)
        lending = see_all_modes(rank, replace(EAGER, foreign_weights=foreign_weights))
        for mine, expected in zip(lending, plain, strict=True):
            assert get_relative_difference(mine, expected) <= 1e-5

    run_ranks(work, 2)
