"""What the layer benchmark found: rows of numbers, a table, a picture."""

import statistics
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from layer_ranks import BALANCED, LIMIT, PLAIN, Found, Job

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


def format_table(rows: Sequence[Row]) -> str:
    """The rows as text."""
    lines = [
        f"{'':20}{'time':>8}{'speed-up':>10}{'':>18}{'/bal.':>7}{'peak memory':>16}"
        f"{'on the wire, MB':>27}{'':>7}",
        f"{'workload, variant':20}{'ms':>8}{'measured':>10}{'limit':>7}{'predicted':>11}{'time':>7}"
        f"{'MiB':>8}{'/bal.':>8}{'tokens':>11}{'weights':>8}{'grads':>8}{'lent':>7}",
    ]
    for row in rows:
        if row.variant == PLAIN:
            lines.append(f"{row.workload}")
        lines.append(
            f"  {row.variant:18}{row.seconds * 1e3:8.0f}{row.speedup:10.2f}{row.limit:7.2f}"
            f"{row.predicted_speedup:11.2f}{row.to_balanced:7.2f}"
            f"{row.peak_bytes / 2**20:8.0f}{row.peak_to_balanced:8.2f}"
            f"{row.token_bytes / 1e6:11.1f}{row.lent_bytes / 1e6:8.1f}"
            f"{row.returned_bytes / 1e6:8.1f}{row.lent_experts:7}"
        )
    errors = [abs(r.predicted_speedup / r.speedup - 1) for r in rows if r.variant != PLAIN]
    lines.append(
        "limit: plain EP, in the same rounds, whose router balances the ranks as `exact` does: "
        "the same work, nothing lent"
    )
    lines.append(
        f"predicted against measured speed-up: {statistics.median(errors):.1%} off in the median, "
        f"{max(errors):.1%} at worst"
    )
    return "\n".join(lines)


def draw(rows: Sequence[Row], caption: str, path: Path) -> None:
    """Write the picture: speed-up over plain EP, and peak memory, by workload.

    Raises:
        ImportError: matplotlib is missing; names the extra.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("the picture needs matplotlib: pip install '.[plot]'") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    workloads = list(dict.fromkeys(row.workload for row in rows))
    variants = list(dict.fromkeys(row.variant for row in rows))
    table = {(row.workload, row.variant): row for row in rows}
    colors = ["#d1603d", "#1d6a96", "#5fa3c7", "#8a9a5b", "#7b5ea7", "#c2a83e"]
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(9, 6.5), sharex=True, layout="constrained")
    width = 0.8 / len(variants)
    for i, variant in enumerate(variants):
        of = [table[workload, variant] for workload in workloads]
        x = [place + (i - (len(variants) - 1) / 2) * width for place in range(len(workloads))]
        name = "plain EP" if variant == PLAIN else f"LLEP, {variant}"
        color = colors[i % len(colors)]
        top.bar(x, [row.speedup for row in of], width * 0.92, color=color, label=name)
        bottom.bar(x, [row.peak_to_balanced for row in of], width * 0.92, color=color)
        if variant != PLAIN:
            predicted = [row.predicted_speedup for row in of]
            label = "predicted by the cost model" if i == len(variants) - 1 else None
            top.plot(x, predicted, "_", color="#333333", markersize=8, label=label)
    for place, workload in enumerate(workloads):
        limit = table[workload, PLAIN].limit
        label = "limit: as if lending were free, same rounds" if place == 0 else None
        ends = (place - 0.42, place + 0.42)
        top.plot(ends, (limit, limit), ":", color="#555555", linewidth=1.2, label=label)
    top.set_ylabel("speed-up over plain EP")
    bottom.set_ylabel("peak memory of the worst rank\n/ plain EP, balanced")
    labels = [f"{name}\n{_explain(name)}" for name in workloads]
    bottom.set_xticks(range(len(workloads)), labels, fontsize=8)
    for axes in (top, bottom):
        axes.axhline(1, color="#bbbbbb", linewidth=1, zorder=0)
        axes.spines[["top", "right"]].set_visible(False)
    top.legend(frameon=False, ncols=3, fontsize=9, loc="upper left")
    top.set_ylim(0, max(row.speedup for row in rows) * 1.3)
    figure.suptitle("One MoE layer of Megatron-core, forward and backward, EP = 2", fontsize=12)
    figure.supxlabel(caption, fontsize=7, color="#666666")
    figure.savefig(path, dpi=130)
    plt.close(figure)


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
