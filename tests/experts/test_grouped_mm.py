"""Experts in grouped GEMMs give what Megatron's `SequentialMLP` gives, on any rows."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from megatron.core.activations import squared_relu
from megatron.core.distributed import DistributedDataParallel
from megatron.core.fusions.fused_bias_geglu import quick_gelu
from megatron.core.transformer.moe.experts import SequentialMLP

from experts.grouped_experts import G, assert_same, build_both, build_experts, run
from megatron_llep.experts.grouped_linear import view_as_one
from megatron_llep.experts.grouped_mm import GroupedMM, LendableGroupedMM, check_kernel
from megatron_llep.experts.kinds import find_kind
from support.layout import Layout, use_layout
from support.ranks import run_ranks

SIZES = ([3, 0, 7, 1, 2], [0, 0, 0, 9, 0], [0, 0, 0, 0, 0], [4, 4, 4, 4, 4])

TOP_1 = {"moe_router_topk": 1, "moe_router_pre_softmax": True}

KINDS: dict[str, dict[str, Any]] = {
    "SwiGLU": {},
    "one expert": {"num_experts": 1},
    "biases": {"add_bias_linear": True},
    "not gated": {"gated_linear_unit": False, "activation_func": squared_relu},
    "not gated, biases": {
        "gated_linear_unit": False,
        "activation_func": torch.nn.functional.gelu,
        "add_bias_linear": True,
    },
    "clamped, offset, biases": {
        "activation_func": quick_gelu,
        "activation_func_clamp_value": 0.5,
        "glu_linear_offset": 1.0,
        "add_bias_linear": True,
    },
    "probabilities on input": TOP_1 | {"moe_apply_probs_on_input": True},
    "probabilities on input, biases": TOP_1
    | {"moe_apply_probs_on_input": True, "add_bias_linear": True},
    "fused activation": {"bias_activation_fusion": True},
    "fused activation, clamped, biases": {
        "bias_activation_fusion": True,
        "activation_func": quick_gelu,
        "activation_func_clamp_value": 0.5,
        "add_bias_linear": True,
    },
}


def on_one_rank(work: Callable[[], None]) -> None:
    """Run in a world of one rank, with Megatron's process groups."""

    def enter(rank: int, size: int) -> None:
        with use_layout(Layout()):
            work()

    run_ranks(enter, 1)


def cut(sizes: Sequence[int], experts: SequentialMLP) -> list[int]:
    return list(sizes[: experts.num_local_experts])


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients(kind):
    def work():
        plain, grouped = build_both(**KINDS[kind])
        for sizes in SIZES:
            assert_same(plain, grouped, cut(sizes, plain))

    on_one_rank(work)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_other_dtypes(dtype):
    def work():
        for kind in ("SwiGLU", "biases"):
            plain, grouped = build_both(dtype, **KINDS[kind])
            for sizes in SIZES:
                assert_same(plain, grouped, sizes)

    on_one_rank(work)


def test_any_rows():
    def work():
        plain, grouped = build_both(torch.float64, add_bias_linear=True)

        @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
        @given(st.lists(st.integers(0, 12), min_size=G, max_size=G))
        def compare(sizes):
            assert_same(plain, grouped, sizes)

        compare()

    on_one_rank(work)


@pytest.mark.parametrize(
    "frozen",
    [
        lambda name: "linear_fc1.weight" in name,
        lambda name: "linear_fc2" in name,
        lambda name: "local_experts.3." in name,
        lambda name: "bias" in name,
        lambda name: True,
    ],
    ids=["first linears", "second linears", "an expert", "biases", "all"],
)
def test_frozen_weights(frozen):
    def work():
        plain, grouped = build_both(add_bias_linear=True)
        for experts in (plain, grouped):
            for name, parameter in experts.named_parameters():
                parameter.requires_grad_(not frozen(name))
        for sizes in SIZES:
            assert_same(plain, grouped, sizes)

    on_one_rank(work)


def test_an_input_that_needs_no_gradient():
    def work():
        found = []
        for experts in build_both():
            output, _ = experts(torch.ones(6, 16), torch.tensor([2, 0, 0, 0, 4]), torch.ones(6))
            output.square().sum().backward()
            found.append([parameter.grad for parameter in experts.parameters()])
        torch.testing.assert_close(*found)

    on_one_rank(work)


def test_one_gemm_per_linear_and_direction(monkeypatch):
    calls = []
    grouped_mm = torch.nn.functional.grouped_mm

    def count(*args, **kwargs):
        calls.append(args)
        return grouped_mm(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "grouped_mm", count)

    def work():
        _, grouped = build_both()
        run(grouped, [3, 0, 7, 1, 2])
        assert len(calls) == 6  # two linears: forward, gradient of the rows, of the weights

    on_one_rank(work)


def lies_as_one(experts: SequentialMLP) -> bool:
    linears = ("linear_fc1", "linear_fc2")
    weights = [[getattr(each, name).weight for each in experts.local_experts] for name in linears]
    return all(view_as_one(each) is not None for each in weights)


def test_converting_keeps_parameters_and_lays_them_out_as_one():
    def work():
        experts = build_experts(add_bias_linear=True)
        before = {name: (id(p), p.detach().clone()) for name, p in experts.named_parameters()}
        shards = {name: vars(p).copy() for name, p in experts.named_parameters()}
        assert not lies_as_one(experts)
        GroupedMM.convert(experts)
        assert lies_as_one(experts)
        assert list(before) == [name for name, _ in experts.named_parameters()]
        for name, parameter in experts.named_parameters():
            assert id(parameter) == before[name][0]
            assert torch.equal(parameter, before[name][1])
            assert vars(parameter) == shards[name]
        assert find_kind(experts) is LendableGroupedMM

    on_one_rank(work)


def test_weights_that_were_moved_apart_again():
    def work():
        plain, grouped = build_both()
        for parameter in grouped.parameters():
            parameter.data = parameter.data.clone()
        assert not lies_as_one(grouped)
        for sizes in SIZES:
            assert_same(plain, grouped, sizes)

    on_one_rank(work)


def test_view_as_one():
    storage = torch.arange(96.0)
    pieces = [storage[start : start + 12].view(3, 4) for start in (4, 24, 44, 64)]
    view = view_as_one(pieces)
    assert torch.equal(view, torch.stack(pieces))
    assert view.data_ptr() == pieces[0].data_ptr()
    assert view_as_one(pieces[::-1]) is None  # a stride cannot be negative
    assert view_as_one([pieces[0], pieces[0]]) is None
    assert view_as_one([pieces[0], pieces[1], pieces[3]]) is None
    assert view_as_one([pieces[0].t(), pieces[1].t()]) is None
    assert view_as_one([storage[:4], storage[5:9]]) is None  # not 16 bytes apart
    assert view_as_one([storage[:8], storage[4:12]]) is None  # overlap
    assert view_as_one([torch.zeros(64), torch.zeros(64)]) is None  # of two storages


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_are_added_to_main_grad(sizes, dtype):
    def work():
        plain, grouped = build_both(dtype, add_bias_linear=True)
        run(plain, sizes)
        for parameter in grouped.parameters():
            # As Megatron's DDP leaves them.
            parameter.main_grad = torch.ones(parameter.shape)
            parameter.grad_added_to_main_grad = False
        run(grouped, sizes)
        for (name, expected), parameter in zip(
            plain.named_parameters(), grouped.parameters(), strict=True
        ):
            assert parameter.grad_added_to_main_grad, name
            assert parameter.grad.shape == parameter.shape  # its hooks run
            tolerance = {torch.float32: 1e-5, torch.bfloat16: 5e-2}[dtype]
            close = {"atol": tolerance, "rtol": tolerance}
            torch.testing.assert_close(parameter.main_grad, 1 + expected.grad.float(), **close)

    on_one_rank(work)


def test_a_parameter_whose_gradient_ddp_must_add_itself():
    def work():
        plain, grouped = build_both()
        for parameter in grouped.parameters():
            parameter.main_grad = torch.zeros(parameter.shape)  # not of Megatron's DDP
        assert_same(plain, grouped, SIZES[0])
        for parameter in grouped.parameters():
            parameter.grad_added_to_main_grad, parameter.zero_out_wgrad = False, True
        assert_same(plain, grouped, SIZES[0])

    on_one_rank(work)


def test_hooks_that_wait_for_parameters_run():
    """Those of Megatron's DDP on linears, which are not called; no others, which read an input."""

    def work():
        _, grouped = build_both()
        waited = []
        for name, module in grouped.named_modules():

            def wait(module, *unused, name=name):
                waited.append(name)

            wait.__module__ = DistributedDataParallel.__module__
            module.register_forward_pre_hook(wait)
            module.register_forward_pre_hook(lambda module, args: args[0].shape and None)
        run(grouped, SIZES[0])
        assert {name for name in waited if name.endswith(("linear_fc1", "linear_fc2"))} == {
            f"local_experts.{i}.linear_fc{j}" for i in range(G) for j in (1, 2)
        }
        assert len(waited) == len(set(waited))

    on_one_rank(work)


def test_modules_that_are_refused():
    class Special(SequentialMLP):
        pass

    def work():
        with pytest.raises(
            ValueError, match=r"--moe-llep-expert-gemm grouped_mm: .* not of Linear"
        ):
            GroupedMM.convert(torch.nn.Linear(4, 4))
        experts = build_experts()
        experts.__class__ = Special
        with pytest.raises(ValueError, match="not of Special"):
            GroupedMM.convert(experts)
        experts = build_experts()
        experts.local_experts[2].linear_fc2 = torch.nn.Linear(4, 4)
        with pytest.raises(ValueError, match="--transformer-impl local"):
            GroupedMM.convert(experts)
        with pytest.raises(ValueError, match="--moe-ffn-hidden-size"):
            GroupedMM.convert(build_experts(moe_ffn_hidden_size=22))
        assert type(experts) is SequentialMLP

    on_one_rank(work)


def test_a_torch_without_grouped_gemms_is_refused(monkeypatch):
    monkeypatch.delattr(torch.nn.functional, "grouped_mm")
    with pytest.raises(ValueError, match="install a newer torch"):
        GroupedMM.convert(torch.nn.Linear(4, 4))


@pytest.mark.parametrize(
    ("dtype", "shape", "capability", "remedy"),
    [
        (torch.float32, (8, 8), (9, 0), "--bf16"),
        (torch.bfloat16, (8, 8), (7, 5), "--moe-llep-expert-gemm megatron"),
        (torch.bfloat16, (8, 12), (9, 0), "multiples of 8"),
        (torch.float32, (6, 8), None, "multiples of 4"),
    ],
)
def test_weights_that_the_kernel_does_not_take(dtype, shape, capability, remedy):
    with pytest.raises(ValueError, match=remedy) as error:
        check_kernel(dtype, shape, capability)
    assert "--moe-llep-expert-gemm grouped_mm" in str(error.value)
    check_kernel(torch.bfloat16, (8, 16), (9, 0))
    check_kernel(torch.float16, (8, 16), None)
