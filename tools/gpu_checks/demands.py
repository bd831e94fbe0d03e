"""The critical path and memory as tables, and what is demanded of them."""

from collections.abc import Iterable, Sequence

from gpu_checks.critical_path import Row
from gpu_checks.rank_work import PLAIN
from megatron_llep.offline.report.table import format_table

PAPER = {"gpt-oss-120b": 6.1, "deepseek-v3": 5.1, "kimi-k2": 5.0}
"""Figure 4 of arXiv 2601.17111: speed-up over plain EP at 95% into 1 expert, forward, 8 H200."""
HOTTEST, BALANCED = "hot-95-1", "balanced"
DEFAULT_PLANNER = "tolerant"
MOST_SLOWDOWN = 1.02
MOST_MEMORY = 1.10
_HEAD = ("model", "GEMM", "workload", "method")


def format_time_table(rows: Sequence[Row]) -> str:
    """One line for each row, with the speed-up over plain, and the paper's where there is one."""
    head = "lent,experts ms,exchange,lend,return,plan us,total ms,speed-up,forward,experts,paper"
    table = [[*_HEAD, *head.split(",")]]
    for row, base in _beside_plain(rows):
        paper = PAPER.get(row.model) if row.workload == HOTTEST and row.method != PLAIN else None
        parts = (row.expert_seconds, row.exchange_seconds, row.lending_seconds)
        ratios = (
            base.total_seconds / row.total_seconds,
            base.forward_total_seconds / row.forward_total_seconds,
            base.expert_seconds / row.expert_seconds,
        )
        table.append(
            [
                *_describe(row),
                str(row.lent),
                *(f"{seconds * 1e3:.2f}" for seconds in (*parts, row.returning_seconds)),
                f"{row.plan_seconds * 1e6:.0f}",
                f"{row.total_seconds * 1e3:.2f}",
                *(f"{ratio:.2f}" for ratio in ratios),
                str(paper or ""),
            ]
        )
    return format_table(table, "<<<<>")


def format_memory_table(rows: Sequence[Row]) -> str:
    """Peak memory of the worst rank's experts, and beside it the same / balanced."""
    table = [[*_HEAD, "MiB", "/ balanced"]]
    for row, peak, ratio in memory_ratios(rows):
        table.append([*_describe(row), f"{peak / 2**20:.0f}", f"{ratio:.2f}"])
    return format_table(table, "<<<<>")


def find_slow(rows: Sequence[Row]) -> list[str]:
    """What falls short of the speed-ups of the paper, and of plain where routing is balanced."""
    short = []
    for row, base in _beside_plain(rows):
        where = f"{row.model}, {row.experts}, {row.method}"
        speedup = base.total_seconds / row.total_seconds
        held = row.workload == HOTTEST and row.method == DEFAULT_PLANNER
        if held and speedup < PAPER.get(row.model, 0.0):
            short.append(f"{where}: {speedup:.2f} times plain, {PAPER[row.model]} demanded")
        if row.workload == BALANCED and 1 / speedup > MOST_SLOWDOWN:
            short.append(f"{where}: balanced takes {1 / speedup:.3f} of plain")
    return short


def find_heavy(rows: Sequence[Row]) -> list[str]:
    """Where a rank's experts under a planner hold more than 10% above balanced."""
    return [
        f"{', '.join(_describe(row))}: {ratio:.2f} of balanced"
        for row, _, ratio in memory_ratios(rows)
        if row.method != PLAIN and ratio > MOST_MEMORY
    ]


def memory_ratios(rows: Sequence[Row]) -> Iterable[tuple[Row, int, float]]:
    """Each row whose memory is known, its peak, and that / plain's under balanced routing."""
    balanced = {
        (row.model, row.experts): row.peak_bytes
        for row in rows
        if row.method == PLAIN and row.workload == BALANCED and row.peak_bytes
    }
    for row in rows:
        base = balanced.get((row.model, row.experts))
        if base and row.peak_bytes is not None:
            yield row, row.peak_bytes, row.peak_bytes / base


def _beside_plain(rows: Sequence[Row]) -> Iterable[tuple[Row, Row]]:
    """Each row with that of plain for the same work."""
    plain = {(row.model, row.experts, row.workload): row for row in rows if row.method == PLAIN}
    for row in rows:
        yield row, plain[row.model, row.experts, row.workload]


def _describe(row: Row) -> tuple[str, str, str, str]:
    return row.model, row.experts, row.workload, row.method
