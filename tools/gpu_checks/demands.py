"""The critical path and memory as tables, and what is demanded of them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from megatron_llep.offline.report.table import format_table

PLAIN = "plain"
PAPER = {"gpt-oss-120b": 6.1, "deepseek-v3": 5.1, "kimi-k2": 5.0}
"""Figure 4 of arXiv 2601.17111: speed-up over plain EP at 95% into 1 expert, forward, 8 H200."""
HOTTEST, BALANCED = "hot-95-1", "balanced"
DEFAULT_PLANNER = "tolerant"
MOST_SLOWDOWN = 1.02
MOST_MEMORY = 1.10
_HEAD = ("model", "experts", "workload", "method")


@dataclass(frozen=True, kw_only=True)
class Pass:
    """What was measured of one rank's layer."""

    forward_seconds: float
    layer_seconds: float
    """Forward and backward."""
    idle_seconds: float | None
    """Of these, how long the device had nothing to do, as the host was late. None: not seen."""
    host_seconds: float | None
    """Of the host, from counts to token exchange. None of plain Megatron on a GPU: there the host
    waits for the device meanwhile."""
    peak_bytes: int | None
    """Allocated on the device; None where torch does not count."""


@dataclass(frozen=True, kw_only=True)
class Row(Pass):
    """One model, workload and method: its slowest rank, and the highest peak of all ranks."""

    model: str
    experts: str
    """In which grouped GEMM."""
    workload: str
    method: str
    """`PLAIN` or a planner."""
    rank: int
    imbalance: float
    """Most loaded rank / mean, as it ran."""
    lent: int
    """Experts lent, all ranks."""
    exchange_seconds: float
    """Stated: four token exchanges."""
    lending_seconds: float
    """Stated: what is not hidden of weights lent."""
    returning_seconds: float
    """Stated: likewise of gradients returned."""

    @property
    def total_seconds(self) -> float:
        """The layer, forward and backward."""
        stated = self.exchange_seconds + self.lending_seconds + self.returning_seconds
        return self.layer_seconds + stated

    @property
    def forward_total_seconds(self) -> float:
        """The layer's forward: two of the four exchanges, lending, no return."""
        return self.forward_seconds + self.exchange_seconds / 2 + self.lending_seconds


def format_time_table(rows: Sequence[Row]) -> str:
    """One line for each row, with the speed-up over plain, and the paper's where there is one."""
    head = "lent,layer ms,idle,host,exchange,lend,return,total ms,speed-up,forward,layer,paper"
    table = [[*_HEAD, *head.split(",")]]
    for row, base in _beside_plain(rows):
        paper = PAPER.get(row.model) if row.workload == HOTTEST and row.method != PLAIN else None
        seconds = (
            *(row.layer_seconds, row.idle_seconds, row.host_seconds, row.exchange_seconds),
            *(row.lending_seconds, row.returning_seconds, row.total_seconds),
        )
        ratios = (
            base.total_seconds / row.total_seconds,
            base.forward_total_seconds / row.forward_total_seconds,
            base.layer_seconds / row.layer_seconds,
        )
        table.append(
            [
                *_describe(row),
                str(row.lent),
                *("-" if each is None else f"{each * 1e3:.2f}" for each in seconds),
                *(f"{ratio:.2f}" for ratio in ratios),
                str(paper or ""),
            ]
        )
    return format_table(table, "<<<<>")


def format_memory_table(rows: Sequence[Row]) -> str:
    """Peak memory of the slowest rank's layer, and beside it the same / balanced."""
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
    """Where the layer under a planner holds more than 10% above balanced."""
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
    """Each row with that of plain for the same work, where that fits on the device."""
    plain = {(row.model, row.experts, row.workload): row for row in rows if row.method == PLAIN}
    for row in rows:
        base = plain.get((row.model, row.experts, row.workload))
        if base is not None:
            yield row, base


def _describe(row: Row) -> tuple[str, str, str, str]:
    return row.model, row.experts, row.workload, row.method
