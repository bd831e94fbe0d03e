"""What the layer benchmark found: rows of numbers, a table, a picture."""

import statistics
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.layer_ranks import BALANCED, LIMIT, PLAIN, Found, Job
from megatron_llep.offline.report import figure as look
from megatron_llep.offline.report.table import format_table
from megatron_llep.offline.workloads import get_workload, make_counts
from megatron_llep.planner import Plan, make_plan
from megatron_llep.planner.cost.model import EXCHANGES, LayerCost
from megatron_llep.planner.cost.traffic import count_tokens
from megatron_llep.planner.topology import ONE_NODE


@dataclass(frozen=True, kw_only=True)
class Row:
    """One variant under one workload. Times are medians over rounds of the slowest rank."""

    workload: str
    variant: str
    seconds: float
    speedup: float
    """Plain EP's time / this one's: median over rounds of the ratio within a round."""
    limit: float
    """The same for `LIMIT`, measured in the same rounds: what lending could reach at most here."""
    predicted_speedup: float
    """From the cost model."""
    to_balanced: float
    """This time / plain EP's under balanced routing."""
    imbalance: float
    """Most loaded rank's tokens / mean, as it ran."""
    peak_bytes: int
    """Of the worst rank: weights, gradients, activations, foreign experts, buffers."""
    peak_to_balanced: float
    """This peak / plain EP's under balanced routing."""
    token_bytes: int
    """Tokens and their gradients that cross the wire, all ranks, four exchanges."""
    lent_bytes: int
    """Weights that cross the wire, all ranks."""
    returned_bytes: int
    """Their gradients."""
    lent_experts: int


def make_rows(job: Job, found: Sequence[Found], cost: LayerCost) -> list[Row]:
    """Put the ranks' findings together; `BALANCED` is among the workloads."""
    rows = []
    balanced_seconds = statistics.median(_worst(found, (BALANCED, PLAIN)))
    balanced_peak = max(rank.peak_bytes[BALANCED, PLAIN] for rank in found)
    for workload in job.workloads:
        counts = make_counts(
            workload,
            num_ranks=job.sizes["num_ranks"],
            num_experts=job.sizes["num_experts"],
            tokens_per_rank=job.sizes["tokens_per_rank"],
            top_k=1,
            seed=job.seed,
        )
        plain_plan = make_plan(counts, planner="exact", max_foreign=0)
        plain_predicted = cost.predict(plain_plan, counts, ONE_NODE).total
        plain_seconds = _worst(found, (workload, PLAIN))
        limit_seconds = _worst(found, (workload, LIMIT))
        for variant in job.variants:
            key = workload, variant
            plan = found[0].plans.get(key, plain_plan)
            seconds, peak = _worst(found, key), max(rank.peak_bytes[key] for rank in found)
            rows.append(
                Row(
                    workload=workload,
                    variant=variant,
                    seconds=statistics.median(seconds),
                    speedup=_compare(plain_seconds, seconds),
                    limit=_compare(plain_seconds, limit_seconds),
                    predicted_speedup=plain_predicted / cost.predict(plan, counts, ONE_NODE).total,
                    to_balanced=statistics.median(seconds) / balanced_seconds,
                    imbalance=plan.imbalance_after,
                    peak_bytes=peak,
                    peak_to_balanced=peak / balanced_peak,
                    **_count_bytes(plan, counts, cost),
                )
            )
    return rows


def format_rows(rows: Sequence[Row]) -> str:
    """The rows as text."""
    head = "workload, variant;ms;speed-up;limit;predicted;ms / bal.;MiB;MiB / bal."
    lines = [[*head.split(";"), "tokens MB", "weights MB", "grads MB", "lent"]]
    for row in rows:
        if row.variant == PLAIN:
            lines.append([row.workload])
        lines.append(
            [
                f"  {row.variant}",
                f"{row.seconds * 1e3:.0f}",
                *(f"{x:.2f}" for x in (row.speedup, row.limit, row.predicted_speedup)),
                f"{row.to_balanced:.2f}",
                f"{row.peak_bytes / 2**20:.0f}",
                f"{row.peak_to_balanced:.2f}",
                *(f"{x / 1e6:.1f}" for x in (row.token_bytes, row.lent_bytes, row.returned_bytes)),
                str(row.lent_experts),
            ]
        )
    errors = [abs(r.predicted_speedup / r.speedup - 1) for r in rows if r.variant != PLAIN]
    return (
        f"{format_table(lines)}\n"
        "limit: plain EP, in the same rounds, whose router balances the ranks as `exact` does: "
        "the same work, nothing lent. MB: on the wire. MiB: peak memory. bal.: balanced\n"
        f"predicted against measured speed-up: {statistics.median(errors):.1%} off in the median, "
        f"{max(errors):.1%} at worst"
    )


def draw(rows: Sequence[Row], caption: str, path: Path) -> None:
    """Write the picture: speed-up over plain EP, and peak memory, by workload.

    Raises:
        ImportError: matplotlib is missing; names the extra.
    """
    workloads = list(dict.fromkeys(row.workload for row in rows))
    by_name: dict[str, list[Row]] = {}
    for row in rows:
        name = "plain EP" if row.variant == PLAIN else f"LLEP, {row.variant}"
        by_name.setdefault(name, []).append(row)
    colors = (look.PLAIN, *look.METHODS)
    speedups = {name: [row.speedup for row in of_one] for name, of_one in by_name.items()}
    peaks = {name: [row.peak_to_balanced for row in of_one] for name, of_one in by_name.items()}
    with look.open_figure(path, (9, 6.5), rows=2, sharex=True) as (figure, axes):
        top, bottom = axes.flat
        places = look.draw_bars(top, speedups, colors)
        look.draw_bars(bottom, peaks, colors)
        label = "predicted by the cost model"
        for name, of_one in list(by_name.items())[1:]:
            predicted = [row.predicted_speedup for row in of_one]
            top.plot(places[name], predicted, "_", color=look.INK, markersize=8, label=label)
            label = None
        label = "limit: as if lending were free, same rounds"
        for place, row in enumerate(by_name["plain EP"]):
            ends = (place - 0.42, place + 0.42)
            top.plot(ends, (row.limit, row.limit), ":", color="#555555", lw=1.2, label=label)
            label = None
        top.set(ylabel="speed-up over plain EP", ylim=(0, max(row.speedup for row in rows) * 1.3))
        top.legend(ncols=3, fontsize=9, loc="upper left")
        bottom.set_ylabel("peak memory of the worst rank\n/ plain EP, balanced")
        labels = [f"{name}\n{_explain(name)}" for name in workloads]
        bottom.set_xticks(range(len(workloads)), labels, fontsize=8)
        figure.suptitle("One MoE layer of Megatron-core, forward and backward, EP = 2", size=12)
        figure.supxlabel(caption, fontsize=7, color="#666666")


def _explain(workload: str) -> str:
    """The first part of the workload's summary, in short lines."""
    return textwrap.fill(get_workload(workload).summary.split(",")[0], width=19)


def _worst(found: Sequence[Found], key: tuple[str, str]) -> list[float]:
    """Seconds of the slowest rank in each round."""
    return [max(ranks) for ranks in zip(*(rank.seconds[key] for rank in found), strict=True)]


def _compare(a: Sequence[float], b: Sequence[float]) -> float:
    """Median over rounds of a / b."""
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


def _count_bytes(plan: Plan, counts, cost: LayerCost) -> Mapping[str, int]:
    tokens, shape = count_tokens(plan, counts, ONE_NODE), cost.shape
    lent = len(plan.transfers)
    return {
        "token_bytes": int(tokens[0, 0].sum()) * shape.token_bytes * EXCHANGES,
        "lent_bytes": lent * shape.expert_bytes * (1 + shape.refetch),
        "returned_bytes": lent * shape.gradient_bytes,
        "lent_experts": lent,
    }
