"""One rank's experts in LLEP's grouped GEMMs.

Shape letters: G slots in use, N (token, expert) pairs sorted by slot, H hidden size, F inner size.

This is the work whose time the critical path takes: SwiGLU experts, forward, dgrad and wgrad, the
weight gradients added to fp32 buffers as Megatron's main_grad. The router's probabilities are left
out.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import silu

Outputs = list[torch.Tensor]
"""[n, H] of each part of the slots, in order; N rows in all."""

Backward = Callable[[torch.Tensor], Outputs]
"""Gradient of the outputs [N, H] -> of the rows, by part; adds to the slab's gradients. Once."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Slab:
    """Weights of a rank's slots, natives first, and where their gradients add up."""

    fc1: torch.Tensor
    """[G, 2F, H]: gate, then up."""
    fc2: torch.Tensor
    """[G, H, F]."""
    fc1_grad: torch.Tensor
    """fp32, as fc1."""
    fc2_grad: torch.Tensor
    """fp32, as fc2."""

    @classmethod
    def allocate(
        cls, *, slots: int, hidden: int, ffn: int, dtype: torch.dtype, device: torch.device
    ) -> "Slab":
        """Random weights, zero gradients."""
        generator = torch.Generator(device=device).manual_seed(0)

        def weights(*shape: int) -> torch.Tensor:
            tensor = torch.empty(shape, dtype=dtype, device=device)
            return tensor.normal_(std=0.02, generator=generator)

        fc1, fc2 = weights(slots, 2 * ffn, hidden), weights(slots, hidden, ffn)
        return cls(
            fc1=fc1,
            fc2=fc2,
            fc1_grad=torch.zeros_like(fc1, dtype=torch.float32),
            fc2_grad=torch.zeros_like(fc2, dtype=torch.float32),
        )

    def first(self, slots: int) -> "Slab":
        """The first so many slots."""
        return Slab(**{name: tensor[:slots] for name, tensor in vars(self).items()})

    @property
    def nbytes(self) -> int:
        """Weights and gradients."""
        return sum(tensor.nbytes for tensor in vars(self).values())


Experts = Callable[[Slab, torch.Tensor, list[int], int], tuple[Outputs, Backward]]
"""(slab of G slots, rows [N, H], tokens of each of the G slots, how many of these are native) ->
(outputs, backward)."""


def run_apart(
    slab: Slab, rows: torch.Tensor, tokens: list[int], num_native: int
) -> tuple[Outputs, Backward]:
    """As LLEP computes experts: natives, then lent ones if there are."""
    natives, lent = slice(num_native), slice(num_native, None)
    return _run_grouped_mm(slab, rows, tokens, [natives, lent][: 1 + bool(tokens[lent])])


def run_together(
    slab: Slab, rows: torch.Tensor, tokens: list[int], num_native: int
) -> tuple[Outputs, Backward]:
    """Natives and lent experts in one GEMM: what sharing one would gain."""
    return _run_grouped_mm(slab, rows, tokens, [slice(None)])


def _run_grouped_mm(
    slab: Slab, rows: torch.Tensor, tokens: list[int], parts: Sequence[slice]
) -> tuple[Outputs, Backward]:
    """Each part of the slots by itself; in backward the last one first, as in autograd's order."""
    # The package around it imports Megatron, which a rank must not before it chose its device.
    from megatron_llep.experts.grouped_linear import Groups, grouped_linear

    sizes = [sum(tokens[part]) for part in parts]
    leaves = [part.detach().requires_grad_() for part in rows.split(sizes)]
    outputs = []
    for part, leaf in zip(parts, leaves, strict=True):
        groups = Groups.of(tokens[part], rows.device)
        inner = grouped_linear(leaf, _as_parameters(slab.fc1[part], slab.fc1_grad[part]), groups)
        fc2 = _as_parameters(slab.fc2[part], slab.fc2_grad[part])
        outputs.append(grouped_linear(Activation.apply(inner), fc2, groups))

    def backward(grad: torch.Tensor) -> Outputs:
        for output, part in reversed(list(zip(outputs, grad.split(sizes), strict=True))):
            output.backward(part)
        return [leaf.grad for leaf in leaves if leaf.grad is not None]

    return list(outputs), backward


def _as_parameters(weights: torch.Tensor, grads: torch.Tensor) -> list[torch.nn.Parameter]:
    """Slots' weights [G, out, in] as Megatron's DDP has them; new ones, without a gradient."""
    parameters = [torch.nn.Parameter(weight) for weight in weights]
    for parameter, grad in zip(parameters, grads, strict=True):
        marked: Any = parameter
        marked.main_grad, marked.grad_added_to_main_grad = grad, False
    return parameters


class Activation(torch.autograd.Function):
    """SwiGLU that keeps its input alone."""

    @staticmethod
    def forward(ctx: Any, inner: torch.Tensor) -> torch.Tensor:
        """[N, 2F] -> [N, F]."""
        ctx.save_for_backward(inner)
        gate, up = inner.chunk(2, dim=1)
        return silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        """[N, F], which it uses up -> [N, 2F]."""
        (inner,) = ctx.saved_tensors
        gate, up = inner.chunk(2, dim=1)
        grad_inner = torch.empty_like(inner)
        grad_gate, grad_up = grad_inner.chunk(2, dim=1)
        torch.mul(grad, silu(gate), out=grad_up)
        grad_gate.copy_(torch.ops.aten.silu_backward(grad.mul_(up), gate))
        return grad_inner
