"""LLEP against plain expert parallelism, on the same weights and tokens: numbers and a verdict."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

MOST_LOSS, MOST_GRADIENT = 1e-5, 1e-4
"""fp32: relative differences from plain, as in the tests on CPUs."""
MOST_LOSS_BF16, MOST_CONTROL = 5e-3, 2.0
"""bf16: the loss, and how much further from fp32 than plain bf16 a gradient may be."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one rank saw of some micro-batches."""

    losses: list[float]
    gradients: dict[str, torch.Tensor]
    """fp32, on the host, of every parameter."""
    lent: int
    """Transfers of all plans."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """LLEP against plain Megatron on one rank."""

    what: str
    lent: int
    """Experts lent in all layers and micro-batches."""
    loss_difference: float
    """Largest relative difference of a loss from plain."""
    gradient_difference: float
    """Largest |LLEP - plain| of a parameter's gradient / largest |plain|, worst parameter."""
    worst_parameter: str
    control_ratio: float | None = None
    """bf16: distance of LLEP's gradient from plain's in fp32 / that of plain's in bf16 (norms),
    worst parameter."""

    def __str__(self) -> str:
        ratio = self.control_ratio
        control = "" if ratio is None else f", distance from fp32 {ratio:.2f} of plain's"
        return (
            f"{self.what}: {self.lent} lent, losses {self.loss_difference:.1e}, gradients "
            f"{self.gradient_difference:.1e} apart{control}"
        )


def compare(what: str, lending: Outcome, plain: Outcome, exact: Outcome | None) -> Comparison:
    """LLEP against plain, and in low precision both against `exact`, plain in fp32."""
    differences = {
        name: _relative(lending.gradients[name] - gradient, gradient)
        for name, gradient in plain.gradients.items()
    }
    worst = max(differences, key=lambda name: differences[name])
    ratio = None
    if exact is not None:
        ratio = max(
            _ratio(lending.gradients[name], plain.gradients[name], gradient)
            for name, gradient in exact.gradients.items()
        )
    return Comparison(
        what=what,
        lent=lending.lent,
        loss_difference=max(
            abs(mine - theirs) / abs(theirs)
            for mine, theirs in zip(lending.losses, plain.losses, strict=True)
        ),
        gradient_difference=differences[worst],
        worst_parameter=worst,
        control_ratio=ratio,
    )


def merge(ranks: Sequence[Comparison]) -> Comparison:
    """The worst rank's numbers of one comparison."""
    worst = max(ranks, key=lambda each: each.gradient_difference)
    ratios = [each.control_ratio for each in ranks if each.control_ratio is not None]
    return replace(
        worst,
        loss_difference=max(each.loss_difference for each in ranks),
        control_ratio=max(ratios) if ratios else None,
    )


def find_shortfall(each: Comparison) -> str:
    """What falls short, or nothing."""
    low_precision = "bfloat16" in each.what
    if each.lent == 0:
        return "nothing was lent, so nothing was compared"
    if not each.loss_difference <= (MOST_LOSS_BF16 if low_precision else MOST_LOSS):
        return "losses differ"
    if low_precision:
        if each.control_ratio is not None and not each.control_ratio <= MOST_CONTROL:
            return f"gradients are further from fp32 than {MOST_CONTROL} times plain's"
    elif not each.gradient_difference <= MOST_GRADIENT:
        return f"the gradient of {each.worst_parameter} differs"
    return ""


def _relative(difference: torch.Tensor, reference: torch.Tensor) -> float:
    """Largest difference / largest reference; the difference itself where that is 0. NaN is inf."""
    largest, scale = difference.abs().max().item(), reference.abs().max().item()
    relative = largest / scale if scale else largest
    return relative if relative == relative else float("inf")


def _ratio(lending: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor) -> float:
    """Distance of LLEP from exact / distance of plain from exact; both 0 where nothing flows."""
    scale = exact.norm().item()
    control = (plain - exact).norm().item()
    distance = (lending - exact).norm().item()
    # Below a thousandth of the gradient, what rounding leaves is chance.
    return distance / max(control, 1e-3 * scale) if scale else float(distance > 0)
