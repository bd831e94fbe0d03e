"""Foreign experts in Transformer Engine's module, over a stand-in for its grouped GEMM."""

from collections import Counter
from typing import Any

import pytest
import torch

pytest.importorskip("transformer_engine.pytorch")

from megatron.core.fp8_utils import get_fp8_context
from te_hosting import (
    NATIVE,
    ROWS,
    TOKENS,
    Modules,
    make_expert_config,
    run_both,
    run_micro_batches,
)

from support.layout import Layout, use_layout
from support.ranks import run_ranks

pytestmark = pytest.mark.te

FP8 = {"fp8": "hybrid", "fp8_recipe": "tensorwise"}
BF16 = {"params_dtype": torch.bfloat16, "bf16": True}
FUSED = {"gradient_accumulation_fusion": True}
PROBS_ON_INPUT = {
    "moe_apply_probs_on_input": True,
    "moe_router_topk": 1,
    "moe_router_pre_softmax": True,
}
ACT = {"recompute_granularity": "selective", "recompute_modules": ["moe_act"]}


def on_one_rank(work, *args: Any) -> Any:
    def with_groups(rank, size):
        with use_layout(Layout()):
            return work(*args)

    return run_ranks(with_groups, 1)[0]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        FUSED,
        BF16,
        BF16 | FUSED,
        {"add_bias_linear": True},
        FUSED | {"add_bias_linear": True},
        ACT,
        PROBS_ON_INPUT,
        {"gated_linear_unit": False},
        {"gated_linear_unit": False, "add_bias_linear": True} | BF16 | FUSED,
        BF16 | FP8,
        BF16 | FP8 | FUSED,
        BF16 | FP8 | {"add_bias_linear": True},
    ],
    ids=lambda changes: "-".join(changes) or "fp32",
)
def test_hosted_experts_are_those_of_one_module(changes, gemms):
    """Bit for bit; natives and foreign experts have a grouped GEMM each."""

    def work():
        config = make_expert_config(**changes)
        modules = Modules.make(config)
        del gemms[:]
        for actual, expected in run_both(modules, config):
            assert torch.equal(actual, expected)
            assert actual.abs().sum() > 0
        expected, actual = modules.gradients()
        for mine, other in zip(actual, expected, strict=True):
            assert torch.equal(mine, other)
        return Counter(gemms)

    sizes = (len(TOKENS), NATIVE, len(TOKENS) - NATIVE)
    # Two linears.
    assert on_one_rank(work) == {
        (layout, size): 2 for layout in ("TN", "NN", "NT") for size in sizes
    }


@pytest.mark.parametrize(
    "changes",
    [
        FUSED | ACT,
        FUSED | {"add_bias_linear": True},
        BF16 | FP8 | FUSED,
        BF16 | FP8 | FUSED | ACT,
    ],
    ids="-".join,
)
def test_micro_batches_in_flight(changes, gemms):
    """Forwards before the backwards of others, as in a pipeline: each finds what it left."""

    def work():
        config = make_expert_config(**changes)
        modules = Modules.make(config)
        for actual, expected in run_micro_batches(modules, config, 3):
            assert torch.equal(actual, expected)
            assert actual.abs().sum() > 0
        expected, actual = modules.gradients()
        for mine, other in zip(actual, expected, strict=True):
            assert torch.equal(mine, other)

    on_one_rank(work)


def test_foreign_gradients_are_added(gemms):
    """To what main_grad holds already; natives' are written as Megatron's linears were told."""

    def work():
        config = make_expert_config(**FUSED)
        modules = Modules.make(config)
        for linear in (modules.module.linear_fc1, modules.module.linear_fc2):
            assert linear.is_first_microbatch  # TE overwrites main_grad
        for weights in modules.lendable.weights() + modules.foreign:
            for weight in weights:
                weight.main_grad += 1
        run_both(modules, config)
        expected, actual = modules.gradients()
        natives = 2 * NATIVE
        for mine, other in zip(actual[:natives], expected[:natives], strict=True):
            assert torch.equal(mine, other)
        for mine, other in zip(actual[natives:], expected[natives:], strict=True):
            torch.testing.assert_close(mine, other + 1)
        for linear in (modules.module.linear_fc1, modules.module.linear_fc2):
            assert not linear.is_first_microbatch
        # The next micro-batch adds, natives too.
        run_both(modules, config)
        expected, actual = modules.gradients()
        for mine, other in zip(actual[:natives], expected[:natives], strict=True):
            assert torch.equal(mine, other)

    on_one_rank(work)


@pytest.mark.parametrize("frozen", ["natives", "foreign"])
def test_one_may_train_without_the_other(frozen, gemms):
    """As experts are frozen on some ranks: TE looks at the first of those that it computes."""

    def work():
        config = make_expert_config(**FUSED)
        modules = Modules.make(config)
        natives = 2 * NATIVE
        for weights in modules.lendable.weights() if frozen == "natives" else modules.foreign:
            for weight in weights:
                weight.requires_grad_(False)
        for actual, expected in run_both(modules, config):
            assert torch.equal(actual, expected)
        expected, actual = modules.gradients()
        for i, (mine, other) in enumerate(zip(actual, expected, strict=True)):
            if (i < natives) == (frozen == "natives"):
                assert not mine.any()
            else:
                assert torch.equal(mine, other)

    on_one_rank(work)


def test_the_module_is_as_before(gemms):
    """After a forward, also one that fails, and while it lasts but for what TE reads."""

    def work():
        config = make_expert_config(add_bias_linear=True, **FP8, **BF16)
        modules = Modules.make(config)
        module = modules.module
        keys = list(module.state_dict())
        values = {name: value.clone() for name, value in module.state_dict().items()}
        parameters = {name: id(value) for name, value in module.named_parameters()}
        linears = (module.linear_fc1, module.linear_fc2)
        known = [set(vars(linear)) for linear in linears]
        inside, whole = [], []

        def look(linear, _):
            same = list(module.state_dict()) == keys
            same &= {name: id(value) for name, value in module.named_parameters()} == parameters
            inside.append((linear.num_gemms, same))

        hooks = [
            module.linear_fc2.register_forward_pre_hook(look),
            module.register_forward_hook(lambda *_: whole.append(True)),
        ]
        run_both(modules, config)
        assert inside == [(NATIVE, True), (len(TOKENS) - NATIVE, True)]
        assert len(whole) == 1
        for hook in hooks:
            hook.remove()

        def fail(linear, _):
            if linear.num_gemms != NATIVE:
                raise RuntimeError("on purpose")

        hook = module.linear_fc2.register_forward_pre_hook(fail)
        hidden = torch.randn(sum(TOKENS), config.hidden_size, dtype=torch.bfloat16)
        with pytest.raises(RuntimeError, match="on purpose"):
            forward(modules, hidden, lending=True)
        hook.remove()
        for linear, names in zip(linears, known, strict=True):
            # TE keeps a few flags of its last forward.
            assert not {name for name in set(vars(linear)) - names if "weight" in name}
            assert not {name for name in set(vars(linear)) - names if "bias" in name}
            assert linear.num_gemms == NATIVE
            assert not linear.disable_parameter_transpose_cache
        assert module.quantization_padding.num_gemms == NATIVE
        assert module.quantization_unpadding.num_gemms == NATIVE
        assert list(module.state_dict()) == keys
        for name, value in module.state_dict().items():
            assert torch.equal(value, values[name]), name

    on_one_rank(work)


def forward(modules: Modules, hidden: torch.Tensor, *, lending: bool) -> torch.Tensor:
    """A micro-batch of the host; without lending, Megatron's own forward of the natives."""
    probs = torch.ones(len(hidden))
    if lending:
        return modules.compute(hidden, probs)
    return modules.module(hidden[: ROWS[0]], torch.tensor(TOKENS[:NATIVE]), probs[: ROWS[0]])[0]


@pytest.mark.parametrize("order", ["lend-plain", "plain-lend", "lend-plain-lend-plain"])
def test_fp8_weights_are_those_of_now(order, gemms):
    """TE caches quantised weights over the micro-batches of a step; lending must not spoil it."""

    def work():
        config = make_expert_config(**FP8, **BF16, **FUSED)
        modules, fresh = Modules.make(config), Modules.make(config)
        natives = [w for m in (modules, fresh) for expert in m.lendable.weights() for w in expert]
        foreign = [w for m in (modules, fresh) for expert in m.foreign for w in expert]
        for linear in (fresh.module.linear_fc1, fresh.module.linear_fc2):
            linear.disable_parameter_transpose_cache = True
        hidden = torch.randn(sum(TOKENS), config.hidden_size, dtype=torch.bfloat16)
        for step in range(3):
            for linear in (modules.module.linear_fc1, modules.module.linear_fc2):
                linear.is_first_microbatch = True  # as Megatron does at every step in FP8
            for kind in order.split("-"):
                with get_fp8_context(config):
                    actual = forward(modules, hidden, lending=kind == "lend")
                    expected = forward(fresh, hidden, lending=kind == "lend")
                assert torch.equal(actual, expected), f"step {step}: {kind}"
                actual.sum().backward()
                expected.sum().backward()
            for one, other in zip(*modules_gradients(modules, fresh), strict=True):
                assert torch.equal(one, other)
            with torch.no_grad():
                for weight in natives + foreign:
                    weight *= 1.5
                    weight.main_grad.zero_()

    on_one_rank(work)


def modules_gradients(one: Modules, other: Modules) -> tuple[list[Any], list[Any]]:
    return one.gradients()[1], other.gradients()[1]


def test_weights_are_quantised_no_more_often_than_by_megatron(gemms):
    """Natives once a step, as without lending; foreign experts whenever they are borrowed."""

    def work():
        config = make_expert_config(**FP8, **BF16)
        modules = Modules.make(config)
        hidden = torch.randn(sum(TOKENS), config.hidden_size, dtype=torch.bfloat16)
        linear = modules.module.linear_fc1
        cached = []
        for lending in (True, True, False, True):
            with get_fp8_context(config):
                forward(modules, hidden, lending=lending)
            assert set(linear._fp8_workspaces) == {f"weight{i}" for i in range(NATIVE)}
            # Renewed in place, or made anew: neither happens within a step.
            cached.append([(id(w), w.data.clone()) for w in linear._fp8_workspaces.values()])
            with torch.no_grad():
                for expert in modules.lendable.weights():
                    expert[0].mul_(2)
        for later in cached[1:]:
            for (mine, values), (first, expected) in zip(later, cached[0], strict=True):
                assert mine == first
                assert torch.equal(values.float(), expected.float())

    on_one_rank(work)


def test_quantisers_are_made_once(gemms):
    """Those of the natives serve foreign experts, whichever forward comes first."""

    def work():
        config = make_expert_config(**FP8, **BF16)
        modules = Modules.make(config)
        hidden = torch.randn(sum(TOKENS), config.hidden_size, dtype=torch.bfloat16)
        found = []
        for lending in (True, False, True):
            with get_fp8_context(config):
                forward(modules, hidden, lending=lending)
            quantizers = modules.module.linear_fc1.quantizers
            found.append([id(each) for kind in quantizers.values() for each in kind])
        return len(found[0]), found[0] == found[1] == found[2]

    assert on_one_rank(work) == (5 * NATIVE, True)


def test_every_slot_is_padded(gemms):
    """Rows of each expert, foreign ones too, to what FP8 kernels need."""

    def work():
        config = make_expert_config(**FP8, **BF16)
        modules = Modules.make(config)
        rows = []
        linear = modules.module.linear_fc1

        def look(_, inputs):
            rows.append((len(inputs[0]), list(inputs[1])))

        linear.register_forward_pre_hook(look)
        run_both(modules, config)
        return rows

    padded = [-(-tokens // 16) * 16 for tokens in TOKENS]
    assert on_one_rank(work) == [(sum(part), part) for part in (padded[:NATIVE], padded[NATIVE:])]
