"""The look that all pictures share, and how one is opened and saved; matplotlib is optional."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

PLAIN, LLEP, CONTROL = "#d1603d", "#1d6a96", "#8a8a8a"
"""Plain EP, which is the reference of a comparison, what is held against it, and a control."""
INK, FAINT, BAD = "#333333", "#bbbbbb", "#b3261e"
METHODS = (LLEP, "#5fa3c7", "#8a9a5b", "#7b5ea7", "#c2a83e", "#c98a94")
"""Several methods beside plain EP; lines take them in this order by themselves."""

STYLE: dict[str, Any] = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "figure.titlesize": 14,
    "figure.titleweight": "bold",
    "hatch.linewidth": 0.6,
    "svg.hashsalt": "megatron_llep",
    "savefig.dpi": 120,
}


def import_pyplot() -> Any:
    """matplotlib.pyplot without a display.

    Raises:
        ImportError: it is missing; says how to get it.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install 'megatron-llep[plot]'") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


@contextmanager
def open_figure(
    output: Path, size: tuple[float, float], *, rows: int = 1, columns: int = 1, **options: Any
) -> Iterator[tuple[Any, np.ndarray]]:
    """Give a figure and its axes [rows, columns]; written, the same bytes each time, at the end.

    Args:
        output: the file; its suffix says the format.
        size: width and height in inches.
        rows: of panels.
        columns: of panels.
        options: of `pyplot.subplots`.

    Raises:
        ImportError: matplotlib is missing; says how to get it.
        ValueError: matplotlib does not know the suffix.
    """
    plt = import_pyplot()
    cycle = plt.cycler(color=METHODS)
    with plt.rc_context({**STYLE, "axes.prop_cycle": cycle}):
        figure, axes = plt.subplots(
            rows, columns, figsize=size, layout="constrained", squeeze=False, **options
        )
        try:
            yield figure, axes
            output.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(output, metadata={"Date": None} if output.suffix == ".svg" else None)
        finally:
            plt.close(figure)


def draw_bars(
    axes: Any, heights: Mapping[str, Sequence[float]], colors: Sequence[str]
) -> dict[str, np.ndarray]:
    """Groups of bars: in each group one bar of every series, by name, in one color.

    Returns:
        Where the bars of a series stand on the x axis, on which groups are 1 apart, from 0.
    """
    width = 0.8 / len(heights)
    places = {}
    for number, (name, values) in enumerate(heights.items()):
        offset = (number - (len(heights) - 1) / 2) * width
        places[name] = np.arange(len(values)) + offset
        axes.bar(places[name], values, 0.92 * width, label=name, color=colors[number])
    axes.axhline(1, color=FAINT, linewidth=1, zorder=0)
    return places
