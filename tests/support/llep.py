"""Train with LLEP and see what was lent; compare with plain expert parallelism."""

from dataclasses import dataclass, replace
from typing import Literal

from megatron_llep.config import LLEPConfig
from megatron_llep.integration.convert import convert_model, with_llep
from megatron_llep.layer import LLEPMoELayer
from megatron_llep.placement.forward import Planned
from megatron_llep.planner import Plan
from support.comparison import get_relative_difference
from support.training import Chunks, Run, TrainResult, train

# Lends whenever the ranks' loads differ at all.
EAGER = LLEPConfig(planner="exact", imbalance_threshold=1.0, min_tokens_per_gemm=1)

Seam = Literal["model", "spec"]


@dataclass(frozen=True)
class Loans:
    """What the layers of one rank decided during a run."""

    plans: int
    fallbacks: int
    transfers: int
    imbalance_before: float
    """The worst of all plans."""
    imbalance_after: float


def train_with_llep(run: Run, llep: LLEPConfig = EAGER, seam: Seam = "model") -> TrainResult:
    """As `train`, with LLEP switched on through one of its seams; `observed` holds the Loans."""
    decisions: list[Planned] = []

    def watch(chunks: Chunks) -> None:
        if seam == "model":
            convert_model(chunks, llep)
        note_decisions(chunks, decisions)

    result = train(
        run,
        transform_spec=(lambda spec: with_llep(spec, llep)) if seam == "spec" else None,
        transform_model=watch,
    )
    return replace(result, observed=_sum_up([decision.plan for decision in decisions]))


def assert_same_run(
    actual: TrainResult,
    plain: TrainResult,
    *,
    loss_tolerance: float = 1e-5,
    gradient_tolerance: float = 1e-4,
    exact: TrainResult | None = None,
) -> None:
    """Losses, norms, gradients, final parameters and optimizer state of one rank are `plain`'s.

    `exact` is plain's run in more precision: tensors may differ from plain's as much as those do.
    """
    for name in ("losses", "gradient_norms"):
        for mine, expected in zip(getattr(actual, name), getattr(plain, name), strict=True):
            assert abs(mine - expected) <= loss_tolerance * abs(expected), (
                f"{name} {getattr(actual, name)} != {getattr(plain, name)}"
            )
    for name in ("gradients", "parameters", "buffers", "optimizer_state"):
        mine, expected = getattr(actual, name), getattr(plain, name)
        assert mine.keys() == expected.keys()
        for key in expected:
            difference = get_relative_difference(mine[key], expected[key])
            allowed = gradient_tolerance
            if exact is not None and name in ("gradients", "parameters"):
                control = get_relative_difference(expected[key], getattr(exact, name)[key])
                allowed = max(allowed, control)
            assert difference <= allowed, (
                f"{name}: {key} differs by {difference:.1e}, allowed {allowed:.1e}"
            )


def note_decisions(chunks: Chunks, decisions: list[Planned]) -> None:
    """Append to `decisions` whatever the LLEP layers of the model decide from now on."""
    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, LLEPMoELayer):
                module.token_dispatcher.on_plan.append(decisions.append)


def _sum_up(plans: list[Plan]) -> Loans:
    return Loans(
        plans=len(plans),
        fallbacks=sum(plan.is_fallback for plan in plans),
        transfers=sum(len(plan.transfers) for plan in plans),
        imbalance_before=max((plan.imbalance_before for plan in plans), default=1.0),
        imbalance_after=max((plan.imbalance_after for plan in plans), default=1.0),
    )
