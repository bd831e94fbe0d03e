"""From measurements to a cost model, and how well it predicts what it was not fitted to."""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_llep.offline.calibration.fit import (
    ExpertTiming,
    LinkTimings,
    find_errors,
    fit_expert,
    fit_link,
    predict_transfer,
)
from megatron_llep.planner.cost.link import Link
from megatron_llep.planner.cost.model import CostModel


@dataclass(frozen=True, kw_only=True)
class Check:
    """How well held-out timings were predicted: relative errors."""

    what: str
    points: int
    median: float
    worst: float

    def __str__(self) -> str:
        return (
            f"{self.what}: {self.median:.0%} off in the median, {self.worst:.0%} at worst "
            f"({self.points} points held out)"
        )


def build_cost_model(
    *,
    machine: str,
    experts: Sequence[ExpertTiming],
    inside: LinkTimings | None = None,
    across: LinkTimings | None = None,
    copy_bytes_per_second: float,
    overlap: float,
    planning_seconds: float,
    intra_node: Link | None = None,
    inter_node: Link | None = None,
) -> tuple[CostModel, list[Check]]:
    """Fit a cost model to every other timing and check it on the rest.

    Args:
        machine: in words.
        experts: per size of expert, by growing tokens.
        inside: exchanges inside nodes; None where nobody has another one there.
        across: between nodes; None with one node.
        copy_bytes_per_second: as in the cost model; so are `overlap` and `planning_seconds`.
        overlap: see above.
        planning_seconds: see above.
        intra_node: default: fitted to `inside`; without these as between nodes.
        inter_node: default: fitted to `across`; without these as inside the node.

    Raises:
        ValueError: too few timings, or they do not grow with the work; no link is known.
    """
    fitted, held_out = _split(experts)
    expert = fit_expert(fitted)
    checks = [
        _check(
            "forward and backward of an expert",
            [expert.predict(t) for t in held_out],
            [t.forward_seconds + t.backward_seconds for t in held_out],
        )
    ]
    if intra_node is None and inside:
        intra_node, more = _fit_and_check(inside, "")
        checks += more
    if inter_node is None and across:
        inter_node, more = _fit_and_check(across, " between nodes")
        checks += more
    known = intra_node or inter_node
    if known is None:
        raise ValueError("no link is known: measure several ranks, or give one")
    model = CostModel(
        machine=machine,
        flops_per_second=expert.flops_per_second,
        half_rate_tokens=expert.half_rate_tokens,
        gemm_overhead_seconds=expert.gemm_overhead_seconds,
        backward_factor=expert.backward_factor,
        copy_bytes_per_second=copy_bytes_per_second,
        intra_node=intra_node or known,
        inter_node=inter_node or known,
        overlap=overlap,
        planning_seconds=planning_seconds,
    )
    return model, checks


def _fit_and_check(timings: LinkTimings, where: str) -> tuple[Link, list[Check]]:
    """A link, and how it predicts what it was not fitted to."""
    used, unused = _split(timings.regular)
    link = fit_link(used)
    checks = []
    for what, held_out in (("transfers", unused), ("uneven exchanges", timings.uneven)):
        if held_out:
            predicted = [predict_transfer(link, t) for t in held_out]
            checks.append(_check(what + where, predicted, [t.seconds for t in held_out]))
    return link, checks


def _split[T](timings: Sequence[T]) -> tuple[list[T], list[T]]:
    """The timings to fit, and those in between."""
    return list(timings[::2]), list(timings[1::2])


def _check(what: str, predicted: Sequence[float], measured: Sequence[float]) -> Check:
    median, worst = find_errors(predicted, measured)
    return Check(what=what, points=len(measured), median=median, worst=worst)
