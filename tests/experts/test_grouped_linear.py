"""The grouped linear layer against a loop over experts in fp64, on a CPU and, marked, on a GPU.

Letters: G experts, n rows of all of them, A and B sizes of a row before and after the layer.
"""

from collections.abc import Sequence

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from experts.grouped_experts import TOLERANCE
from megatron_llep.experts.grouped_linear import Groups, grouped_linear, spread_biases, view_as_one
from megatron_llep.experts.grouped_mm import run_experts
from support.comparison import get_relative_difference

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
A, B = 96, 160
SIZES = ([33, 0, 128, 1, 70], [0, 0, 0, 257, 0], [0, 0, 0, 0, 0])


def draw(device: str, *shape: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device, torch.bfloat16)


def make_foreign(device: str, G: int) -> list[torch.Tensor]:
    """G weights [B, A] in a buffer that holds other tensors between them, as lent ones do."""
    flat = draw(device, G, 3 * B * A)
    return [row[B * A : 2 * B * A].view(B, A).detach().requires_grad_() for row in flat]


def make_scattered(device: str, G: int) -> list[torch.Tensor]:
    return [weight.detach().requires_grad_() for weight in draw(device, G, B, A).flip(0).unbind()][
        ::-1
    ]


def assert_close(found: torch.Tensor | None, expected: torch.Tensor | None, what: str) -> None:
    assert found is not None, what
    assert expected is not None
    if expected.numel():
        difference = get_relative_difference(found.double().cpu(), expected.double().cpu())
        assert difference <= TOLERANCE[torch.bfloat16], f"{what} differs by {difference:.1e}"


def check(device: str, weights: Sequence[torch.Tensor], sizes: Sequence[int]) -> None:
    """Compare output and all gradients with those of the loop."""
    hidden = draw(device, sum(sizes), A, seed=2).requires_grad_()
    grad = draw(device, sum(sizes), B, seed=3)
    output = grouped_linear(hidden, weights, Groups.of(sizes, hidden.device))
    output.backward(grad)

    rows = hidden.detach().double().requires_grad_()
    wide = [weight.detach().double().requires_grad_() for weight in weights]
    parts = zip(rows.split(list(sizes)), wide, strict=True)
    expected = torch.cat([part @ weight.t() for part, weight in parts])
    expected.backward(grad.double())
    assert_close(output, expected, "output")
    assert_close(hidden.grad, rows.grad, "gradient of the rows")
    for i, (weight, other) in enumerate(zip(weights, wide, strict=True)):
        assert_close(weight.grad, other.grad, f"gradient of weight {i}")
        assert sizes[i] or not weight.grad.any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_weights_at_equal_distances(device, sizes):
    weights = make_foreign(device, len(sizes))
    assert view_as_one(weights) is not None
    check(device, weights, sizes)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_weights_in_reverse_order(device, sizes):
    weights = make_scattered(device, len(sizes))
    assert view_as_one(weights) is None
    check(device, weights, sizes)


@pytest.mark.parametrize("device", DEVICES)
def test_biases(device):
    sizes = SIZES[0]
    biases = [bias.detach().requires_grad_() for bias in draw(device, len(sizes), B).unbind()]
    rows = spread_biases(biases, Groups.of(sizes, biases[0].device))
    grad = draw(device, sum(sizes), B, seed=3)
    rows.backward(grad)
    expected = torch.cat([b.expand(size, -1) for b, size in zip(biases, sizes, strict=True)])
    assert torch.equal(rows, expected)
    for bias, part in zip(biases, grad.double().split(sizes), strict=True):
        assert_close(bias.grad, part.sum(0), "gradient of a bias")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("make", [make_foreign, make_scattered])
def test_main_grad(device, make):
    sizes = SIZES[0]
    plain, fused = make(device, len(sizes)), make(device, len(sizes))
    for weight in fused:
        weight.main_grad = torch.ones(B, A, device=device)
        weight.grad_added_to_main_grad = False
    hidden = draw(device, sum(sizes), A, seed=2)
    for weights in (plain, fused):
        output = grouped_linear(hidden, weights, Groups.of(sizes, hidden.device))
        output.backward(draw(device, sum(sizes), B, seed=3))
    for weight, other in zip(fused, plain, strict=True):
        assert weight.grad_added_to_main_grad
        torch.testing.assert_close(weight.main_grad, 1 + other.grad.float())


def make_experts(device: str, G: int, H: int, F: int) -> list[tuple[torch.Tensor, ...]]:
    """G experts' weights as a loan hands them out: over one flat buffer."""
    shapes = ((2 * F, H), (2 * F,), (H, F), (H,))
    widths = [torch.Size(shape).numel() for shape in shapes]
    flat = draw(device, G, sum(widths)) * 0.2
    return [
        tuple(
            piece.view(shape).detach().requires_grad_()
            for piece, shape in zip(row.split(widths), shapes, strict=True)
        )
        for row in flat
    ]


def make_like(H: int, F: int) -> torch.nn.Module:
    like = torch.nn.Module()
    like.config = TransformerConfig(
        num_layers=1,
        hidden_size=H,
        num_attention_heads=1,
        num_moe_experts=8,
        moe_ffn_hidden_size=F,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        bias_activation_fusion=False,
        add_bias_linear=True,
    )
    like.activation_func = like.config.activation_func
    return like


@pytest.mark.parametrize("device", DEVICES)
def test_whole_experts(device):
    H, F, sizes = 64, 96, SIZES[0]
    experts = make_experts(device, len(sizes), H, F)
    hidden = draw(device, sum(sizes), H, seed=2).requires_grad_()
    probs = torch.rand(sum(sizes), generator=torch.Generator().manual_seed(3)).to(device)
    grad = draw(device, sum(sizes), H, seed=4)
    output = run_experts(make_like(H, F), experts, hidden, sizes, probs)
    output.backward(grad)

    rows = hidden.detach().double().requires_grad_()
    wide = [[weight.detach().double().requires_grad_() for weight in each] for each in experts]
    expected = []
    for part, prob, (fc1, bias1, fc2, bias2) in zip(
        rows.split(sizes), probs.double().split(sizes), wide, strict=True
    ):
        gate, up = (part @ fc1.t() + bias1).chunk(2, -1)
        expected.append((torch.nn.functional.silu(gate) * up @ fc2.t() + bias2) * prob[:, None])
    torch.cat(expected).backward(grad.double())
    assert_close(output, torch.cat(expected), "output")
    assert_close(hidden.grad, rows.grad, "gradient of the rows")
    for each, others in zip(experts, wide, strict=True):
        for weight, other in zip(each, others, strict=True):
            assert_close(weight.grad, other.grad, f"gradient of {tuple(weight.shape)}")


@pytest.mark.gpu
def test_the_host_never_waits():
    H, F, sizes = 256, 512, [33, 0, 128, 1, 700]
    experts = make_experts("cuda", len(sizes), H, F)
    hidden = draw("cuda", sum(sizes), H).requires_grad_()
    probs = torch.rand(sum(sizes), device="cuda")
    like = make_like(H, F)

    def step() -> None:
        run_experts(like, experts, hidden, sizes, probs).backward(torch.ones_like(hidden))

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_weights_that_lie_as_one_are_not_copied():
    G, sizes = 5, [64] * 5
    hidden = draw("cuda", sum(sizes), A)
    taken = []
    for make in (make_foreign, make_scattered):
        weights = make("cuda", G)
        groups = Groups.of(sizes, hidden.device)
        with torch.no_grad():
            grouped_linear(hidden, weights, groups)
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            grouped_linear(hidden, weights, groups)
            taken.append(torch.cuda.max_memory_allocated() - before)
    in_place, copied = taken
    assert copied - in_place >= 0.9 * G * B * A * 2
