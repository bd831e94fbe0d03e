"""Whether experts that are about to be timed compute the right thing: a wrong GEMM may be fast.

Shape letters: G slots in use, N (token, expert) pairs sorted by slot, H hidden size.
"""

from itertools import accumulate, pairwise

import torch
from torch.nn.functional import linear, silu

from gpu_checks.experts import Experts, Slab

_ROWS = 32
"""At the start and at the end of a slot, of which outputs and gradients are compared."""
_SLOTS = 4
"""The first and the last so many that have rows."""
_MOST_DIFFERENCE = 2e-2
"""Relative, in norm: some roundings to bf16."""


def check_experts(
    experts: Experts, slab: Slab, rows: torch.Tensor, tokens: list[int], num_native: int
) -> None:
    """Compare with fp32: outputs and gradients of some rows, and gradients of one slot's weights.

    Args:
        experts: what is to be timed.
        slab: G slots; their gradients are zero afterwards.
        rows: [N, H], which serve as input and as the gradient of the output.
        tokens: of each of the G slots.
        num_native: of the G slots.

    Raises:
        RuntimeError: says what differs.
    """
    spans = {
        slot: span
        for slot, span in enumerate(pairwise(accumulate(tokens, initial=0)))
        if span[0] < span[1]
    }
    busy = list(spans)
    smallest = min(busy, key=lambda slot: tokens[slot])
    outputs, backward = experts(slab, rows, tokens, num_native)
    compared = {
        slot: sorted({*range(start, end)[:_ROWS], *range(start, end)[-_ROWS:]})
        for slot, (start, end) in spans.items()
        if slot in busy[:_SLOTS] + busy[-_SLOTS:]
    }
    found = {slot: _take(outputs, some) for slot, some in compared.items()}
    for output in outputs:  # as when they are timed: both would not fit
        output.untyped_storage().resize_(0)
    grads = backward(rows)
    for slot, some in compared.items():
        output, grad, _, _ = _compute(slab, slot, rows[some])
        _compare(f"output of slot {slot}", found[slot], output)
        _compare(f"gradient of slot {slot}'s rows", _take(grads, some), grad)
    _, _, fc1_grad, fc2_grad = _compute(slab, smallest, rows[slice(*spans[smallest])])
    _compare(f"gradient of slot {smallest}'s first weight", slab.fc1_grad[smallest], fc1_grad)
    _compare(f"gradient of slot {smallest}'s second weight", slab.fc2_grad[smallest], fc2_grad)
    slab.fc1_grad.zero_()
    slab.fc2_grad.zero_()


def _take(parts: list[torch.Tensor], rows: list[int]) -> torch.Tensor:
    """Rows by their number in all parts together."""
    taken, first = [], 0
    for part in parts:
        inside = [row - first for row in rows if first <= row < first + len(part)]
        taken.append(part[inside])
        first += len(part)
    return torch.cat(taken)


def _compute(slab: Slab, slot: int, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """One slot, in fp32: output, and gradients of the rows and of both weights."""
    inputs = [each.detach().float() for each in (rows, slab.fc1[slot], slab.fc2[slot])]
    hidden, fc1, fc2 = (each.requires_grad_() for each in inputs)
    gate, up = linear(hidden, fc1).chunk(2, dim=1)
    output = linear(silu(gate) * up, fc2)
    return output.detach(), *torch.autograd.grad(output, (hidden, fc1, fc2), rows.float())


def _compare(what: str, found: torch.Tensor, expected: torch.Tensor) -> None:
    difference = ((found.float() - expected).norm() / expected.norm()).item()
    if not difference <= _MOST_DIFFERENCE:
        raise RuntimeError(
            f"{what} differs by {difference:.1e} from fp32's: what it times is wrong"
        )
