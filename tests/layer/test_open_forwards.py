"""Two forwards of one layer are open at once, step by step; results are plain Megatron's.

Letters: T tokens of a rank, H hidden size.
"""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from megatron.core.transformer.moe.moe_layer import MoELayer

from layer.test_layer_float64 import TOLERANCE, H, build_layer
from megatron_llep.integration.convert import convert_model
from megatron_llep.placement.forward import Planned
from support.comparison import get_relative_difference
from support.layout import Layout, use_layout
from support.llep import EAGER, note_decisions
from support.ranks import run_ranks

SHARED = {"moe_shared_expert_intermediate_size": 16}
TOKENS = (48, 20)


class Forward:
    """A forward of one micro-batch through Megatron's steps, and its backward.

    With `cut`, each step's inputs are detached from the step before, as Megatron's schedules do
    that run a forward of one micro-batch beside a backward of another.
    """

    def __init__(self, layer: MoELayer, hidden: torch.Tensor, *, cut: bool):
        self.cut = cut
        self.cuts: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.output: torch.Tensor | None = None
        self.steps = self.take_steps(layer, hidden)

    def pass_on(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if not self.cut:
            return tensors
        leaves = tuple(tensor.detach().requires_grad_(tensor.requires_grad) for tensor in tensors)
        self.cuts.append((tensors, leaves))
        return leaves

    def take_steps(self, layer: MoELayer, hidden: torch.Tensor) -> Iterator[str]:
        shared_output = layer.shared_experts_compute(hidden)
        probs, routing_map = layer.route(hidden)
        yield "route"
        rows, probs = self.pass_on(*layer.preprocess(hidden, probs, routing_map))
        yield "preprocess"
        rows, probs = self.pass_on(*layer.dispatch(rows, probs))
        yield "dispatch"
        output, _ = layer.routed_experts_compute(rows, probs)
        (output,) = self.pass_on(output)
        yield "compute"
        self.output = layer.postprocess(layer.combine(output), shared_output)
        yield "combine"

    def run_to(self, name: str) -> None:
        for step in self.steps:
            if step == name:
                return

    def run_backward(self) -> None:
        gradient = torch.linspace(-1, 1, self.output.numel(), dtype=torch.float64)
        self.output.backward(gradient.view_as(self.output))
        for tensors, leaves in reversed(self.cuts):
            pairs = [(t, leaf.grad) for t, leaf in zip(tensors, leaves, strict=True)]
            torch.autograd.backward(*zip(*pairs, strict=True))


def run_in_turn(layer: MoELayer, hidden: list[torch.Tensor], *, backwards: str, cut: bool):
    a, b = (Forward(layer, each, cut=cut) for each in hidden)
    a.run_to("dispatch")
    b.run_to("dispatch")
    a.run_to("combine")
    b.run_to("combine")
    for each in {"a first": (a, b), "b first": (b, a)}[backwards]:
        each.run_backward()
    return a.output.detach(), b.output.detach()


def run_one_by_one(layer: MoELayer, hidden: list[torch.Tensor]):
    outputs = []
    for each in hidden:
        forward = Forward(layer, each, cut=False)
        forward.run_to("combine")
        forward.run_backward()
        outputs.append(forward.output.detach())
    return outputs


@pytest.mark.parametrize("foreign_weights", ["keep", "refetch"])
@pytest.mark.parametrize("backwards", ["a first", "b first"])
@pytest.mark.parametrize("cut", [False, True], ids=["whole", "cut"])
def test_two_micro_batches_in_turn(cut, backwards, foreign_weights):
    layout = Layout(ep=2)

    def work(rank, size):
        with use_layout(layout):
            settings = {} if cut else SHARED
            plain, ours = (build_layer(layout, rank, 1.0, **settings) for _ in range(2))
            ours.load_state_dict(plain.state_dict())
            convert_model([ours], replace(EAGER, foreign_weights=foreign_weights))
            planned: list[Planned] = []
            note_decisions([ours], planned)
            results = []
            for layer in (plain, ours):
                generator = torch.Generator().manual_seed(rank)
                hidden = [
                    torch.rand(tokens, 1, H, generator=generator, dtype=torch.float64)
                    for tokens in TOKENS
                ]
                for each in hidden:
                    each.requires_grad_()
                if layer is plain:
                    outputs = run_one_by_one(layer, hidden)
                else:
                    outputs = run_in_turn(layer, hidden, backwards=backwards, cut=cut)
                grads = {name: p.grad for name, p in layer.named_parameters()}
                inputs = {f"input {number}": each.grad for number, each in enumerate(hidden)}
                results.append({**dict(enumerate(outputs)), **inputs, **grads})
        expected, found = results
        for name, value in expected.items():
            assert get_relative_difference(found[name], value) <= TOLERANCE, name
        return [each.plan.max_foreign for each in planned]

    assert all(all(slots) and len(slots) == 2 for slots in run_ranks(work, 2, timeout=60))


def test_a_routing_map_may_be_given_again():
    """Both forwards are routed by one tensor, before either goes on."""

    def work(rank, size):
        with use_layout(Layout(ep=2)):
            plain, ours = (build_layer(Layout(ep=2), rank, 1.0, **SHARED) for _ in range(2))
            ours.load_state_dict(plain.state_dict())
            convert_model([ours], EAGER)
            outputs = []
            for layer in (plain, ours):
                generator = torch.Generator().manual_seed(rank)
                hidden = [
                    torch.rand(32, 1, H, generator=generator, dtype=torch.float64) for _ in "ab"
                ]
                probs, routing_map = layer.router(hidden[0])
                layer.router.forward = lambda *_, given=(probs, routing_map): given
                forwards = [Forward(layer, each, cut=False) for each in hidden]
                for name in ("route", "combine") if layer is ours else ("combine",):
                    for forward in forwards:
                        forward.run_to(name)
                outputs.append([forward.output.detach() for forward in forwards])
        for found, expected in zip(*outputs, strict=True):
            assert get_relative_difference(found, expected) <= TOLERANCE

    run_ranks(work, 2, timeout=60)
