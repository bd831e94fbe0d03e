"""DeepEP and HybridEP under LLEP: Megatron's own classes, over a stand-in for their buffers.

In float64 a layer equals plain Megatron's with the same back end to 1e-10, and with all-to-all as
far as the back ends' fp32 probabilities allow. Letters: T tokens of a rank, H hidden size.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from megatron.core.transformer.moe.moe_layer import MoELayer

from layer.test_layer_float64 import TOLERANCE, E, H, T, build_layer, run_layer
from megatron_llep.compat import MEGATRON
from megatron_llep.config import LLEPConfig
from megatron_llep.integration.convert import convert_model
from megatron_llep.placement.forward import Planned
from support import deep_ep_stand_in
from support.chaos import watch_collectives
from support.comparison import get_relative_difference
from support.host_reads import HostReads, run_backward
from support.layout import Layout, use_layout
from support.llep import EAGER, note_decisions
from support.parity import Case, compare_one
from support.ranks import run_ranks
from support.routing import Routing
from support.training import Run

BACK_ENDS = ("deepep", "hybridep")
FLEX = replace(EAGER, dispatcher="flex")
REFETCH = replace(FLEX, foreign_weights="refetch")
RECOMPUTED = {"recompute_granularity": "selective", "recompute_modules": ["moe"]}
SHARED = {"moe_shared_expert_intermediate_size": 16}
# HybridEP wants it where ranks have unlike numbers of tokens; Megatron 0.18 has no such setting.
PADDED = {"moe_hybridep_pad_uneven_dispatch_inputs": True} if MEGATRON >= (0, 19) else {}
# The back ends carry probabilities in fp32.
OF_ALLTOALL = 1e-5


@dataclass(frozen=True)
class Layer:
    """What is compared, and whether something must be lent."""

    llep: LLEPConfig = FLEX
    skew: float = 1.0
    """By how much the router favours the experts of rank 0: above 0.5, both of a token's."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    tokens: tuple[int, ...] = (T,) * 4
    lends: bool = True


CASES = {
    "kept": Layer(settings={"moe_router_topk": 3}),
    "refetched": Layer(REFETCH, settings=SHARED | {"moe_shared_expert_overlap": True}),
    "recomputed": Layer(
        settings=RECOMPUTED | {"moe_expert_capacity_factor": 1.5, "moe_token_drop_policy": "probs"}
    ),
    # All tokens are rank 0's: others get none.
    "nothing lent": Layer(replace(FLEX, max_foreign_experts=0), skew=3.0, lends=False),
    "uneven": Layer(replace(FLEX, max_foreign_experts=1), tokens=(T, 1, 2 * T, 4), settings=PADDED),
}


def build(layout: Layout, rank: int, case: Layer, back_end: str | None) -> MoELayer:
    kind = {"moe_token_dispatcher_type": "alltoall"}
    if back_end is not None:
        kind = {"moe_token_dispatcher_type": "flex", "moe_flex_dispatcher_backend": back_end}
    return build_layer(layout, rank, case.skew, **(kind | dict(case.settings)))


def assert_same(found: dict[str, Any], expected: dict[str, Any], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        difference = get_relative_difference(found[name], value) if value.numel() else 0.0
        assert difference <= tolerance, f"{name} differs by {difference:.1e}"


def compare(layout: Layout, rank: int, case: Layer, back_end: str) -> None:
    from megatron.core.transformer.moe import fused_a2a

    ours = build(layout, rank, case, back_end)
    expected = []
    for other in (back_end, None):
        plain = build(layout, rank, case, other)
        plain.load_state_dict(ours.state_dict())
        expected.append(run_layer(plain, rank, case.tokens[rank]))
    convert_model([ours], case.llep)
    planned: list[Planned] = []
    note_decisions([ours], planned)
    fused_a2a.reset_hybrid_ep_buffer()
    with watch_collectives() as calls:
        found = run_layer(ours, rank, case.tokens[rank])
    assert ours.config.moe_token_dispatcher_type == "flex"
    assert_same(found, expected[0], TOLERANCE)
    assert_same(found, expected[1], OF_ALLTOALL)
    foreign = [each.plan.max_foreign for each in planned]
    assert all(foreign) if case.lends else not any(foreign)
    assert len(planned) == (2 if case.settings.get("recompute_modules") else 1)
    if back_end == "hybridep":
        most = case.llep.max_foreign_experts
        native = E // layout.ep
        made_for = [native + (native if most is None else most)]
        assert fused_a2a._hybrid_ep_buffer.made_for == made_for
    exchanges = [group for name, group, _ in calls if "alltoall" in name or "all_to_all" in name]
    lent = [number for number, group in enumerate(exchanges) if group == "LLEP_LENDING"]
    assert bool(lent) == case.lends
    # The stand-in sends how many rows, two things that go with them, and the rows.
    assert not lent or lent[0] >= 4, "weights go before tokens"


def compare_steps(layout: Layout, rank: int, back_end: str) -> None:
    """A rank without tokens, which Megatron's router would refuse: the steps behind it."""
    case, results = Layer(settings=PADDED), []
    for llep in (None, FLEX):
        layer = build(layout, rank, case, back_end)
        planned: list[Planned] = []
        if llep is not None:
            convert_model([layer], llep)
            note_decisions([layer], planned)
        generator = torch.Generator().manual_seed(rank)
        shape = (0 if rank else T, 1, H)
        hidden = torch.rand(shape, generator=generator, dtype=torch.float64, requires_grad=True)
        logits = torch.rand(shape[0], E, generator=generator, dtype=torch.float64)
        routing_map = torch.zeros_like(logits, dtype=torch.bool)
        routing_map[:, :2] = True
        probs = (logits * routing_map).requires_grad_()
        rows, sent = layer.preprocess(hidden, probs, routing_map)
        output, _ = layer.routed_experts_compute(*layer.dispatch(rows, sent))
        output = layer.postprocess(layer.combine(output), None)
        output.square().sum().backward()
        found = {"output": output.detach(), "hidden": hidden.grad, "probs": probs.grad}
        results.append(found | {name: p.grad for name, p in layer.experts.named_parameters()})
    assert planned[-1].plan.max_foreign > 0
    for each in results:
        each.update({name: grad for name, grad in each.items() if grad is not None})
    assert_same(results[1], results[0], TOLERANCE)


def check_host_reads(layout: Layout, rank: int, back_end: str) -> None:
    """But for the counts, nothing of LLEP's or Megatron's waits for the GPU."""
    layer = build(layout, rank, Layer(), back_end)
    convert_model([layer], FLEX)
    hidden = torch.rand(T, 1, H, dtype=torch.float64, requires_grad=True)
    with HostReads([hidden, *layer.parameters(), *layer.buffers()]) as reads:
        output, _ = layer(hidden)
        run_backward(output, torch.ones_like(output))
    # Where kernels place pairs on a GPU, loops of the host do on a CPU.
    on_cpu_alone = ("/placement/tokens.py", "/deep_ep_stand_in.py")
    found = [each for each in reads.found if not any(name in each for name in on_cpu_alone)]
    assert len(found) == 1, found
    assert "/placement/counting.py" in found[0]


def train_flex(layout: Layout, back_end: str, llep: LLEPConfig = FLEX, **config: Any) -> None:
    """A model of the same layers, plain and with LLEP."""
    flex = {"moe_token_dispatcher_type": "flex", "moe_flex_dispatcher_backend": back_end}
    run = Run(layout=layout, routing=Routing("hot"), config=flex | config)
    compare_one(Case(run, llep))


def compare_layouts(rank: int, size: int, layouts: Mapping[Layout, Mapping[str, Layer]]) -> None:
    deep_ep_stand_in.install()
    for layout, cases in layouts.items():
        with use_layout(layout):
            for back_end in BACK_ENDS:
                takes_uneven = back_end == "deepep" or bool(PADDED)
                for name, case in cases.items():
                    if name == "uneven" and not takes_uneven:
                        continue
                    try:
                        compare(layout, rank, case, back_end)
                    except BaseException as error:
                        error.add_note(f"case: {layout}, {back_end}, {name}")
                        raise
                if layout == Layout(ep=2):
                    if takes_uneven:
                        compare_steps(layout, rank, back_end)
                    check_host_reads(layout, rank, back_end)


def test_two_ranks():
    layouts = {Layout(ep=2): CASES, Layout(tp=2, ep=2, etp=1): {"kept": Layer()}}
    run_ranks(compare_layouts, 2, layouts, timeout=240)


def test_four_ranks():
    layouts = {
        Layout(ep=4): {name: CASES[name] for name in ("refetched", "uneven")},
        Layout(tp=2, ep=2, etp=2): {name: CASES[name] for name in ("kept", "nothing lent")},
    }
    run_ranks(compare_layouts, 4, layouts, timeout=240)


def test_training():
    """With Megatron's DDP, whose `main_grad` gets what comes home."""

    def work(rank, size):
        deep_ep_stand_in.install()
        for back_end in BACK_ENDS:
            train_flex(Layout(ep=2), back_end, **RECOMPUTED)

    run_ranks(work, 2, timeout=240)


@pytest.mark.slow
def test_training_with_replicas():
    """The joined ranks of both replicas exchange tokens."""

    def work(rank, size):
        deep_ep_stand_in.install()
        train_flex(Layout(ep=2, dp=4), "deepep", replace(FLEX, replicas="expert-dp"))

    run_ranks(work, 4, timeout=240)
