"""Foreign experts in Transformer Engine's grouped GEMMs, over a stand-in for the kernel."""

from collections import Counter
from typing import Any

import pytest
import torch

pytest.importorskip("transformer_engine.pytorch")

from megatron.core.fp8_utils import get_fp8_context
from te_hosting import NATIVE, TOKENS, Modules, make_expert_config, run_both

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
    """Bit for bit, in one grouped GEMM per linear and direction."""

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

    every = len(TOKENS)
    # Two linears of either module.
    assert on_one_rank(work) == {("TN", every): 4, ("NN", every): 4, ("NT", every): 4}


def test_foreign_gradients_are_added(gemms):
    """To what main_grad holds already, natives' too, whatever Megatron's linears were told."""

    def work():
        config = make_expert_config(**FUSED)
        modules = Modules.make(config)
        for linear in (modules.module.linear_fc1, modules.module.linear_fc2):
            assert linear.is_first_microbatch  # TE would overwrite main_grad
        # A gradient that came home before the natives had any of their own.
        everyone = modules.lendable.weights() + modules.foreign
        for weights in everyone:
            for weight in weights:
                weight.main_grad += 1
        run_both(modules, config)
        expected, actual = modules.gradients()
        for mine, other in zip(actual, expected, strict=True):
            torch.testing.assert_close(mine, other + 1)
        # And it was a first micro-batch: a forward of Megatron's that follows adds, too.
        for linear in (modules.module.linear_fc1, modules.module.linear_fc2):
            assert not linear.is_first_microbatch

    on_one_rank(work)


def test_the_module_is_as_before(gemms):
    """After a forward, also one that fails, and while it lasts but for what TE reads."""

    def work():
        config = make_expert_config(add_bias_linear=True, **FP8, **BF16)
        modules = Modules.make(config)
        module = modules.module
        keys = list(module.state_dict())
        values = {name: value.clone() for name, value in module.state_dict().items()}
        linears = (module.linear_fc1, module.linear_fc2)
        known = [set(vars(linear)) for linear in linears]
        inside = []

        def look(linear, _):
            inside.append((linear.num_gemms, list(module.state_dict()) == keys))

        hook = module.linear_fc2.register_forward_pre_hook(look)
        run_both(modules, config)
        assert inside == [(len(TOKENS), True)]
        hook.remove()

        def fail(*_):
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
        return modules.compute(hidden, probs, torch.tensor(TOKENS))
    tokens = torch.tensor(TOKENS[:NATIVE])
    return modules.module(hidden[: int(tokens.sum())], tokens, probs[: int(tokens.sum())])[0]


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


def test_quantisers_are_made_for_all_slots(gemms):
    """Also when a forward without foreign experts came first; and they are not made again."""

    def work():
        config = make_expert_config(**FP8, **BF16)
        modules = Modules.make(config)
        hidden = torch.randn(sum(TOKENS), config.hidden_size, dtype=torch.bfloat16)
        sizes, made = [], []
        for lending in (False, True, True, False, True):
            with get_fp8_context(config):
                forward(modules, hidden, lending=lending)
            quantizers = modules.module.linear_fc1.quantizers
            sizes.append((len(quantizers["scaling_fwd"]), len(quantizers["scaling_bwd"])))
            made.append(id(quantizers["scaling_fwd"][0]))
        return sizes, len(set(made[1:]))

    sizes, generations = on_one_rank(work)
    assert sizes == [(3 * NATIVE, 2 * NATIVE)] + [(6 * NATIVE, 4 * NATIVE)] * 4
    assert generations == 1


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
    assert on_one_rank(work) == [(sum(padded), padded)]
