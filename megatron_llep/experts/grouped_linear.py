"""A linear layer of many experts as one grouped GEMM, forward and in each part of backward.

Letters: G experts, n rows (tokens) of all of them, sorted by expert, I and O sizes of a row before
and after the layer.

The kernel is `torch.nn.functional.grouped_mm`, which wants the G weights as one 3-D tensor. Where
they lie at equal distances in one storage they are viewed as one; else they are copied together for
the time of the GEMM. It also wants rows of whole 16 bytes. It has no fp64: there a loop stands in.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

ROW_BYTES = 16
"""What the kernel wants the size of a row of any operand to be a multiple of."""


@dataclass(frozen=True)
class Groups:
    """How the rows are shared out among the G experts."""

    sizes: tuple[int, ...]
    """Rows of each expert."""
    ends: torch.Tensor
    """int32 [G] on the device of the rows: where each expert's rows end."""

    @classmethod
    def of(cls, sizes: Sequence[int], device: torch.device) -> "Groups":
        """Groups of these sizes. On a GPU the sizes are copied there without waiting."""
        ends = torch.tensor(list(accumulate(sizes)), dtype=torch.int32)
        if device.type == "cuda":
            ends = ends.pin_memory().to(device, non_blocking=True)
        return cls(tuple(sizes), ends)

    @property
    def total(self) -> int:
        """Rows of all experts."""
        return sum(self.sizes)


def grouped_linear(
    hidden: torch.Tensor, weights: Sequence[torch.Tensor], groups: Groups
) -> torch.Tensor:
    """Multiply each expert's rows [n, I] by its weight [O, I], transposed: [n, O].

    In backward, the gradient of a weight that has a `main_grad` is added to it at once, as
    Megatron's fused kernels do: autograd then gets no gradient of a foreign weight, and a
    meaningless one of a parameter, marked by `grad_added_to_main_grad`, so that the hooks of
    Megatron's DDP run. An expert without rows has a gradient of zeros.
    """
    return _GroupedLinear.apply(groups, hidden, *weights)


def spread_biases(biases: Sequence[torch.Tensor], groups: Groups) -> torch.Tensor:
    """Repeat each expert's bias [O] for each of its rows: [n, O]. Gradients: `grouped_linear`."""
    return _SpreadBiases.apply(groups, *biases)


def view_as_one(tensors: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """G tensors [...] as one [G, ...] without a copy, or None where they do not lie that way."""
    first = tensors[0]
    if len(tensors) == 1:
        return first.unsqueeze(0)
    addresses = [tensor.data_ptr() for tensor in tensors]
    distance = addresses[1] - addresses[0]
    stride = distance // first.element_size()
    last = first.storage_offset() + stride * (len(tensors) - 1) + first.numel()
    if (
        distance < first.nbytes
        or distance % ROW_BYTES
        or any(b - a != distance for a, b in pairwise(addresses))
        # Tensors of other storages may happen to lie at this distance too.
        or last * first.element_size() > first.untyped_storage().nbytes()
        or not all(tensor.is_contiguous() for tensor in tensors)
    ):
        return None
    return first.as_strided((len(tensors), *first.shape), (stride, *first.stride()))


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, groups: Groups, hidden: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        ctx.groups = groups
        # Backward also looks for main_grad at the weights.
        ctx.save_for_backward(hidden if any(ctx.needs_input_grad[2:]) else None, *weights)
        return _multiply(hidden, _as_one(weights).transpose(1, 2), groups)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        hidden, *weights = ctx.saved_tensors
        _, needs_input, *needs_weights = ctx.needs_input_grad
        grad = grad.contiguous()
        grad_hidden = None
        if needs_input:
            grad_hidden = _multiply(grad, _as_one(weights), ctx.groups)
        if not any(needs_weights):
            return (None, grad_hidden, *[None] * len(weights))
        grads = _multiply_groups(grad, hidden, ctx.groups)
        return (None, grad_hidden, *_deliver(weights, grads, needs_weights))


class _SpreadBiases(torch.autograd.Function):
    @staticmethod
    def forward(ctx, groups: Groups, *biases: torch.Tensor) -> torch.Tensor:
        ctx.groups = groups
        ctx.save_for_backward(*biases)
        repeats = torch.diff(groups.ends, prepend=groups.ends.new_zeros(1))
        one = torch.stack(biases)
        return one.repeat_interleave(repeats, dim=0, output_size=groups.total)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        # Sums over groups of rows, in a fixed order: a GEMM with ones, of the narrowest width.
        ones = grad.new_ones(len(grad), ROW_BYTES // grad.element_size())
        grads = _multiply_groups(ones, grad.contiguous(), ctx.groups)[:, 0]
        return (None, *_deliver(ctx.saved_tensors, grads, ctx.needs_input_grad[1:]))


def _as_one(weights: Sequence[torch.Tensor]) -> torch.Tensor:
    one = view_as_one(weights)
    return torch.stack(tuple(weights)) if one is None else one


def _multiply(rows: torch.Tensor, matrices: torch.Tensor, groups: Groups) -> torch.Tensor:
    """Rows [n, A] of each group times its matrix of [G, A, B]: [n, B]."""
    if len(rows) == 0:
        return rows.new_empty(0, matrices.shape[2])
    if rows.dtype == torch.float64:
        parts = zip(rows.split(groups.sizes), matrices, strict=True)
        return torch.cat([part @ matrix for part, matrix in parts])
    return functional.grouped_mm(rows, matrices, offs=groups.ends)


def _multiply_groups(left: torch.Tensor, right: torch.Tensor, groups: Groups) -> torch.Tensor:
    """Rows [n, A], transposed, times rows [n, B], within each group: [G, A, B]."""
    if len(left) == 0:
        return left.new_zeros(len(groups.sizes), left.shape[1], right.shape[1])
    if left.dtype == torch.float64:
        parts = zip(left.split(groups.sizes), right.split(groups.sizes), strict=True)
        return torch.stack([a.t() @ b for a, b in parts])
    products = functional.grouped_mm(left.t(), right, offs=groups.ends)
    # What the kernel leaves where it had nothing to add up is not documented.
    empty = [product for product, size in zip(products, groups.sizes, strict=True) if not size]
    if empty:
        torch._foreach_zero_(empty)
    return products


def _deliver(
    weights: Sequence[torch.Tensor], grads: torch.Tensor, needed: Sequence[bool]
) -> list[torch.Tensor | None]:
    """Add gradients [G, ...] to the weights' main_grad where they have one; what autograd gets."""
    delivered: list[torch.Tensor | None] = [None] * len(weights)
    fused = []
    for i, weight in enumerate(weights):
        if not needed[i]:
            continue
        if _accumulates(weight):
            fused.append(i)
        else:
            delivered[i] = grads[i]
    if not fused:
        return delivered
    mains = [weights[i].main_grad for i in fused]
    main = view_as_one(mains) if len(fused) == len(weights) else None
    if main is not None:
        main.add_(grads)
    else:
        torch._foreach_add_(mains, [grads[i] for i in fused])
    dummy: torch.Tensor | None = None
    for i in fused:
        if weights[i].is_leaf:
            weights[i].grad_added_to_main_grad = True
            dummy = torch.empty_like(weights[i]) if dummy is None else dummy
            # A tensor of its own, so that autograd need not copy what nobody reads.
            delivered[i] = dummy.detach()
    return delivered


def _accumulates(weight: torch.Tensor) -> bool:
    """Whether gradients go to main_grad: of foreign weights, and of parameters in Megatron's DDP.

    DDP's hook would add the gradient there itself, in the same precision; adding it here saves the
    memory of the gradients that wait for their hooks.
    """
    if getattr(weight, "main_grad", None) is None:
        return False
    marked = hasattr(weight, "grad_added_to_main_grad")
    return not weight.is_leaf or (marked and not getattr(weight, "zero_out_wgrad", False))
