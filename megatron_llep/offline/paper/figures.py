"""What the LLEP paper measured: speed-ups over plain expert parallelism, with their settings.

All are forward passes of one layer on 8 H200. Figure 4's values are printed in it; those of the
others were measured off the plotted lines of the paper's PDF, which have them to 0.01.

Figures 6, 7 and 9 do not say their layer. It is taken to be that of Figure 1a (128 experts, 4 a
token, hidden size 2048), with 32,768 tokens a rank: there 6a, 6b, 7b and 9 have the same setting,
and about the same values (`list_repeated`). Figure 7a fits neither half nor twice as many experts:
it falls back to plain expert parallelism between lambda 1.7 and 2 with 15% of the tokens in 4
experts, and between 2 and 2.3 with 20%; their ranks' imbalance is 1.86 and 2.22. Figure 9 does not
fall back at 16 experts and 30%, where the imbalance is 1.2: so lambda is taken to be 1 in Figures
6, 7b and 9, which changes nothing at their other points.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_llep.offline.simulator.models import MODELS, ModelShape

NUM_RANKS = 8


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One layer, its routing, and the method's parameters."""

    hidden: int
    ffn_hidden: int
    num_experts: int
    top_k: int
    tokens: int
    """Of a rank."""
    percent: int
    """Of the (token, expert) pairs that go to hot experts, all on the first ranks."""
    hot: int
    """Hot experts; 0: balanced."""
    capacity_factor: float = 1.0
    """alpha."""
    threshold: float = 1.3
    """lambda, of the load per rank."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """One measurement."""

    setting: Setting
    speedup: float


@dataclass(frozen=True, kw_only=True)
class Figure:
    """Measurements in rows and columns."""

    name: str
    title: str
    corner: str
    """What the rows are."""
    columns: tuple[str, ...]
    rows: dict[str, tuple[Point, ...]]

    @property
    def points(self) -> list[Point]:
        """All, row by row."""
        return [point for row in self.rows.values() for point in row]


_FIGURE_4 = {
    "gpt-oss-120b": {
        (0, 0): 1.07,
        (30, 16): 1.73,
        (30, 4): 2.09,
        (30, 1): 2.41,
        (50, 16): 2.85,
        (50, 4): 3.05,
        (50, 1): 3.48,
        (80, 16): 4.37,
        (80, 4): 4.47,
        (80, 1): 5.26,
        (95, 16): 5.19,
        (95, 4): 5.22,
        (95, 1): 6.11,
    },
    "deepseek-v3": {
        (0, 0): 0.92,
        (30, 16): 1.69,
        (30, 4): 1.76,
        (30, 1): 1.96,
        (50, 16): 2.65,
        (50, 4): 2.83,
        (50, 1): 2.77,
        (80, 16): 3.83,
        (80, 4): 3.64,
        (80, 1): 4.23,
        (95, 16): 4.59,
        (95, 4): 4.64,
        (95, 1): 5.13,
    },
    "kimi-k2": {
        (0, 0): 1.03,
        (30, 16): 1.80,
        (30, 4): 1.94,
        (30, 1): 1.48,
        (50, 16): 2.73,
        (50, 4): 2.85,
        (50, 1): 2.74,
        (80, 16): 4.01,
        (80, 4): 3.96,
        (80, 1): 4.09,
        (95, 16): 4.83,
        (95, 4): 4.67,
        (95, 1): 5.03,
    },
}
"""By model: percent and hot experts -> speed-up."""


def _make_figure_4() -> Figure:
    cells = {model: list(values.items()) for model, values in _FIGURE_4.items()}
    rows = {}
    for (percent, hot), _ in cells["gpt-oss-120b"]:
        points = (
            Point(
                setting=_make_setting(MODELS[model], percent, hot),
                speedup=_FIGURE_4[model][percent, hot],
            )
            for model in cells
        )
        rows[f"{percent}% into {hot}" if hot else "even"] = tuple(points)
    return Figure(name="4", title="three models", corner="routing", columns=tuple(cells), rows=rows)


def _make_setting(model: ModelShape, percent: int, hot: int) -> Setting:
    return Setting(
        hidden=model.layer.hidden,
        ffn_hidden=model.layer.ffn_hidden,
        num_experts=model.layer.num_experts,
        top_k=model.layer.top_k,
        tokens=model.tokens_per_rank,
        percent=percent,
        hot=hot,
    )


_ABLATED = Setting(
    hidden=2048,
    ffn_hidden=2048,
    num_experts=128,
    top_k=4,
    tokens=32768,
    percent=0,
    hot=4,
    threshold=1.0,
)


def _make_curves(
    name: str,
    title: str,
    values: Sequence[float],
    curves: dict[int, Sequence[float]],
    change: Callable[[Setting, float], Setting],
) -> Figure:
    """A figure of curves, each of so many per cent into 4 experts."""
    rows = {}
    for percent, speedups in curves.items():
        base = dataclasses.replace(_ABLATED, percent=percent)
        rows[f"{percent}% into 4"] = tuple(
            Point(setting=change(base, value), speedup=speedup)
            for value, speedup in zip(values, speedups, strict=True)
        )
    columns = tuple(f"{value:,g}" for value in values)
    return Figure(name=name, title=title, corner=title, columns=columns, rows=rows)


FIGURE_4 = _make_figure_4()

FIGURE_6A = _make_curves(
    "6a",
    "tokens a rank",
    (4096, 8192, 16384, 32768, 65536),
    {
        30: (0.66, 0.99, 1.39, 1.81, 2.24),
        50: (0.89, 1.33, 2.00, 2.64, 3.18),
        80: (1.15, 1.84, 2.78, 3.78, 4.73),
        95: (1.29, 2.09, 3.23, 4.29, 5.46),
    },
    lambda base, value: dataclasses.replace(base, tokens=int(value)),
)

FIGURE_6B = _make_curves(
    "6b",
    "alpha",
    (1, 1.5, 2, 2.5, 3),
    {
        30: (1.75, 1.56, 1.28, 1.10, 0.98),
        50: (2.57, 2.16, 1.83, 1.58, 1.38),
        80: (3.66, 3.10, 2.71, 2.29, 1.99),
        95: (4.19, 3.51, 3.09, 2.67, 2.32),
    },
    lambda base, value: dataclasses.replace(base, capacity_factor=value),
)

FIGURE_7A = _make_curves(
    "7a",
    "lambda",
    (1.1, 1.4, 1.7, 2, 2.3, 2.6),
    {
        15: (0.70, 0.69, 0.70, 1.06, 1.07, 1.07),
        20: (0.73, 0.74, 0.74, 0.73, 1.04, 1.04),
        30: (0.89, 0.88, 0.90, 0.88, 0.89, 0.90),
        50: (1.21, 1.22, 1.21, 1.21, 1.21, 1.22),
    },
    lambda base, value: dataclasses.replace(base, threshold=value, tokens=8192),
)

FIGURE_7B = _make_curves(
    "7b",
    "hidden and inner size",
    (512, 1024, 2048, 4096),
    {
        30: (0.80, 1.21, 1.71, 2.24),
        50: (1.06, 1.70, 2.43, 3.36),
        80: (1.47, 2.36, 3.54, 4.93),
        95: (1.67, 2.69, 4.03, 5.73),
    },
    lambda base, value: dataclasses.replace(base, hidden=int(value), ffn_hidden=int(value)),
)

FIGURE_9 = _make_curves(
    "9",
    "experts",
    (16, 32, 64, 128, 256),
    {
        30: (0.61, 1.03, 1.69, 1.81, 1.94),
        50: (1.24, 1.48, 2.05, 2.50, 2.80),
        80: (1.76, 2.23, 2.92, 3.61, 4.04),
        95: (1.94, 2.60, 3.38, 4.06, 4.57),
    },
    lambda base, value: dataclasses.replace(base, num_experts=int(value)),
)

FITTED = (FIGURE_6A, FIGURE_7B, FIGURE_9)
"""Half of their points fit the fixed cost, and the other half test it."""

OTHERS = (FIGURE_4, FIGURE_6B, FIGURE_7A)
"""None of their points is fitted."""


def list_repeated(figures: Sequence[Figure]) -> list[list[float]]:
    """Speed-ups of settings that several figures have, each from the least to the most."""
    found: dict[Setting, list[float]] = {}
    for figure in figures:
        for point in figure.points:
            found.setdefault(point.setting, []).append(point.speedup)
    return [sorted(speedups) for speedups in found.values() if len(speedups) > 1]
