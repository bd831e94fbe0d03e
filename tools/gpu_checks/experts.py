"""One rank's experts on torch's grouped GEMM: native and foreign slots in one slab.

Shape letters: G slots in use, N (token, expert) pairs sorted by slot, H hidden size, F inner size.

This is the work whose time the critical path takes: SwiGLU experts, forward, dgrad and wgrad, the
weight gradients added to fp32 buffers as Megatron's main_grad. The router's probabilities are left
out.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch.nn.functional import grouped_mm, silu

Backward = Callable[[torch.Tensor], torch.Tensor]
"""Gradient of the output [N, H] -> of the rows [N, H]; adds to the slab's gradients. Once."""


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


Experts = Callable[[Slab, torch.Tensor, list[int]], tuple[torch.Tensor, Backward]]
"""(slab of G slots, rows [N, H], tokens of each of the G slots) -> (output [N, H], backward)."""


def run_grouped_mm(
    slab: Slab, rows: torch.Tensor, tokens: list[int]
) -> tuple[torch.Tensor, Backward]:
    """Forward with `torch.nn.functional.grouped_mm`, and the backward to it."""
    ends = torch.tensor(list(accumulate(tokens)), dtype=torch.int32)
    ends = ends.to(rows.device, non_blocking=True)
    used = [slot for slot, count in enumerate(tokens) if count]
    inner = grouped_mm(rows, slab.fc1.transpose(1, 2), offs=ends)
    activated = activate(inner)
    output = grouped_mm(activated, slab.fc2.transpose(1, 2), offs=ends)
    saved = [rows, inner, activated]

    def backward(grad: torch.Tensor) -> torch.Tensor:
        rows, inner, activated = saved
        saved.clear()
        grad_activated = grouped_mm(grad, slab.fc2, offs=ends)
        _add_weight_gradients(slab.fc2_grad, grad, activated, ends, used)
        del activated
        grad_inner = activate_backward(grad_activated, inner)
        del grad_activated, inner
        grad_rows = grouped_mm(grad_inner, slab.fc1, offs=ends)
        _add_weight_gradients(slab.fc1_grad, grad_inner, rows, ends, used)
        return grad_rows

    return output, backward


def activate(inner: torch.Tensor) -> torch.Tensor:
    """SwiGLU: [N, 2F] -> [N, F]."""
    gate, up = inner.chunk(2, dim=1)
    return silu(gate).mul_(up)


def activate_backward(grad: torch.Tensor, inner: torch.Tensor) -> torch.Tensor:
    """Gradient of `activate`: [N, F], which it uses up, and [N, 2F] -> [N, 2F]."""
    gate, up = inner.chunk(2, dim=1)
    grad_inner = torch.empty_like(inner)
    grad_gate, grad_up = grad_inner.chunk(2, dim=1)
    torch.mul(grad, silu(gate), out=grad_up)
    grad_gate.copy_(torch.ops.aten.silu_backward(grad.mul_(up), gate))
    return grad_inner


def _add_weight_gradients(
    total: torch.Tensor,
    grad: torch.Tensor,
    inputs: torch.Tensor,
    ends: torch.Tensor,
    used: list[int],
) -> None:
    """Add [G, A, B] += gradient [N, A], transposed, times inputs [N, B], slot by slot."""
    found = grouped_mm(grad.t(), inputs, offs=ends)
    for slot in used:
        total[slot].add_(found[slot])
