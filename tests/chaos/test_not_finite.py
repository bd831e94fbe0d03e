"""NaN and infinity go where plain Megatron puts them, and spoil no other expert.

Every token has one expert and the model one layer, so that what is spoiled stays in few places.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from megatron.core.transformer.moe.moe_layer import MoELayer

from megatron_llep.integration.convert import convert_model
from megatron_llep.placement.forward import Planned
from support.chaos import SkewedRouting
from support.layout import Layout
from support.llep import EAGER, note_decisions
from support.ranks import run_ranks
from support.training import Run, train

E, SEQUENCE = 8, 16
ROUTING = SkewedRouting("skewed", skew=1.5, seed=3)
CHOSEN = ROUTING.choose(torch.arange(SEQUENCE), 0, E, 1).flatten()  # [s], of every sequence
HOT = int(CHOSEN.mode().values)
TOKEN = int((CHOSEN == HOT).nonzero()[0])
RUN = Run(
    layout=Layout(ep=2),
    routing=ROUTING,
    steps=1,
    micro_batches=2,
    sequence_length=SEQUENCE,
    config={
        "num_layers": 1,
        "num_moe_experts": E,
        "moe_router_topk": 1,
        "moe_router_pre_softmax": True,
    },
)

Spoil = Callable[[MoELayer, int, float], None]


def set_token(tensor: torch.Tensor, value: float) -> torch.Tensor:
    """Replace one token of [s, b, h]."""
    mask = torch.zeros_like(tensor, dtype=torch.bool)
    mask[TOKEN, 0] = True
    return tensor.masked_fill(mask, value)


def spoil_hidden_state(layer: MoELayer, rank: int, value: float) -> None:
    if rank == 0:
        layer.register_forward_pre_hook(lambda _, args: (set_token(args[0], value), *args[1:]))


def spoil_logits(layer: MoELayer, rank: int, value: float) -> None:
    if rank == 0:
        gating = layer.router.gating
        layer.router.gating = lambda hidden: set_token(gating(hidden), value)


def spoil_one_logit(layer: MoELayer, rank: int, value: float) -> None:
    if rank == 0:
        gating = layer.router.gating
        one = torch.zeros(SEQUENCE, 1, E, dtype=torch.bool)
        one[TOKEN, 0, HOT] = True
        layer.router.gating = lambda hidden: gating(hidden).masked_fill(one, value)


def spoil_weight_of_lent_expert(layer: MoELayer, rank: int, value: float) -> None:
    home, index = divmod(HOT, E // 2)
    if rank == home:
        layer.experts.local_experts[index].linear_fc1.weight.data[1, 1] = value


def spoil_gradient_of_output(layer: MoELayer, rank: int, value: float) -> None:
    def hook(layer, args, outputs):
        outputs[0].register_hook(lambda grad: set_token(grad, value))

    if rank == 0:
        layer.register_forward_hook(hook)


SPOILS = (
    spoil_hidden_state,
    spoil_logits,
    spoil_one_logit,
    spoil_weight_of_lent_expert,
    spoil_gradient_of_output,
)


def train_spoiled(spoil: Spoil, rank: int, value: float, llep=None):
    """Train one step; the result, with the MoE layer's output as observed."""
    outputs: list[torch.Tensor] = []
    decisions: list[Planned] = []

    def prepare(chunks):
        if llep is not None:
            convert_model(chunks, llep)
            note_decisions(chunks, decisions)
        layer = chunks[0].decoder.layers[0].mlp
        spoil(layer, rank, value)
        layer.register_forward_hook(lambda layer, args, result: outputs.append(result[0].detach()))

    result = train(RUN, transform_model=prepare)
    assert all(HOT in decision.plan.transfers[:, 0] for decision in decisions)
    return replace(result, observed=outputs[0])


def assert_same_values(actual: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    for kind in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(kind(actual), kind(expected)), f"{what}: {kind.__name__} differs"
    finite = expected.isfinite()
    torch.testing.assert_close(
        actual[finite], expected[finite], rtol=1e-4, atol=1e-6, msg=lambda text: f"{what}: {text}"
    )


@pytest.mark.parametrize("foreign_weights", ["keep", "refetch"])
def test_what_is_not_finite_stays_where_it_is(foreign_weights):
    llep = replace(EAGER, foreign_weights=foreign_weights)

    def work(rank, size):
        spoiled = {}
        for spoil in SPOILS:
            for value in (math.nan, math.inf, -math.inf):
                case = f"{spoil.__name__}, {value}"
                plain = train_spoiled(spoil, rank, value)
                lending = train_spoiled(spoil, rank, value, llep)
                assert_same_values(lending.observed, plain.observed, f"{case}: output")
                for name, gradient in plain.gradients.items():
                    assert_same_values(lending.gradients[name], gradient, f"{case}: {name}")
                assert lending.losses == pytest.approx(plain.losses, rel=1e-5, nan_ok=True)
                spoiled[case] = {
                    name.split(".linear_fc")[0]
                    for name, gradient in plain.gradients.items()
                    if ".experts." in name and not gradient.isfinite().all()
                }
        return spoiled

    first, second = run_ranks(work, 2, timeout=120)
    for case in first:
        # The case is worth something: one expert is spoiled, and the others are not. (A logit of
        # -inf is only an expert that is not chosen.)
        expected = 0 if case == "spoil_one_logit, -inf" else 1
        assert len(first[case] | second[case]) == expected, case
