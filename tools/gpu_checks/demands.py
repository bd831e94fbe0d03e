"""The critical path and memory as tables, and what is demanded of them."""

from collections.abc import Iterable, Sequence

from gpu_checks.critical_path import Row
from gpu_checks.rank_work import PLAIN

PAPER = {"gpt-oss-120b": 6.1, "deepseek-v3": 5.1, "kimi-k2": 5.0}
"""Figure 4 of arXiv 2601.17111: speed-up over plain EP at 95% into 1 expert, forward, 8 H200."""
HOTTEST, BALANCED = "hot-95-1", "balanced"
DEFAULT_PLANNER = "tolerant"
MOST_SLOWDOWN = 1.02
MOST_MEMORY = 1.10


def format_time_table(rows: Sequence[Row]) -> str:
    """One line for each row, with the speed-up over plain, and the paper's where there is one."""
    plain = {(row.model, row.experts, row.workload): row for row in rows if row.method == PLAIN}
    lines = [
        f"{'model':13} {'GEMM':11} {'workload':9} {'method':9} {'lent':>4} "
        f"{'experts ms':>10} {'exchange':>8} {'lend':>6} {'return':>6} {'plan us':>7} "
        f"{'total ms':>8} {'speed-up':>8} {'forward':>7} {'experts':>7} {'paper':>5}"
    ]
    for row in rows:
        base = plain[row.model, row.experts, row.workload]
        paper = PAPER.get(row.model) if row.workload == HOTTEST and row.method != PLAIN else None
        lines.append(
            f"{row.model:13} {row.experts:11} {row.workload:9} {row.method:9} {row.lent:4} "
            f"{row.expert_seconds * 1e3:10.2f} {row.exchange_seconds * 1e3:8.2f} "
            f"{row.lending_seconds * 1e3:6.2f} {row.returning_seconds * 1e3:6.2f} "
            f"{row.plan_seconds * 1e6:7.0f} {row.total_seconds * 1e3:8.2f} "
            f"{base.total_seconds / row.total_seconds:8.2f} "
            f"{base.forward_total_seconds / row.forward_total_seconds:7.2f} "
            f"{base.expert_seconds / row.expert_seconds:7.2f} {paper or '':>5}"
        )
    return "\n".join(lines)


def format_memory_table(rows: Sequence[Row]) -> str:
    """Peak memory of the worst rank's experts, and beside it the same / balanced."""
    lines = [f"{'model':13} {'GEMM':11} {'workload':9} {'method':9} {'MiB':>8} {'/ balanced':>10}"]
    for row, ratio in memory_ratios(rows):
        assert row.peak_bytes is not None
        lines.append(
            f"{row.model:13} {row.experts:11} {row.workload:9} {row.method:9} "
            f"{row.peak_bytes / 2**20:8.0f} {ratio:10.2f}"
        )
    return "\n".join(lines)


def find_slow(rows: Sequence[Row]) -> list[str]:
    """What falls short of the speed-ups of the paper, and of plain where routing is balanced."""
    plain = {(row.model, row.experts, row.workload): row for row in rows if row.method == PLAIN}
    short = []
    for row in rows:
        base = plain[row.model, row.experts, row.workload]
        where = f"{row.model}, {row.experts}, {row.method}"
        if row.workload == HOTTEST and row.method == DEFAULT_PLANNER:
            speedup = base.total_seconds / row.total_seconds
            if speedup < PAPER.get(row.model, 0.0):
                short.append(f"{where}: {speedup:.2f} times plain, {PAPER[row.model]} demanded")
        if row.workload == BALANCED:
            slowdown = row.total_seconds / base.total_seconds
            if slowdown > MOST_SLOWDOWN:
                short.append(f"{where}: balanced takes {slowdown:.3f} of plain")
    return short


def find_heavy(rows: Sequence[Row]) -> list[str]:
    """Where a rank's experts under a planner hold more than 10% above balanced."""
    return [
        f"{row.model}, {row.experts}, {row.workload}, {row.method}: {ratio:.2f} of balanced"
        for row, ratio in memory_ratios(rows)
        if row.method != PLAIN and ratio > MOST_MEMORY
    ]


def memory_ratios(rows: Sequence[Row]) -> Iterable[tuple[Row, float]]:
    """Each row whose memory is known, with its peak / that of plain under balanced routing."""
    balanced = {
        (row.model, row.experts): row.peak_bytes
        for row in rows
        if row.method == PLAIN and row.workload == BALANCED and row.peak_bytes
    }
    for row in rows:
        base = balanced.get((row.model, row.experts))
        if base and row.peak_bytes is not None:
            yield row, row.peak_bytes / base
