"""The comparison as Markdown, and its place in a page, between two markers."""

import textwrap
from collections.abc import Iterable

from megatron_llep.offline.paper.comparison import Comparison
from megatron_llep.offline.paper.figures import (
    FIGURE_4,
    FIGURE_6A,
    FIGURE_6B,
    FIGURE_7A,
    FIGURE_9,
    FITTED,
    OTHERS,
    Figure,
    Point,
    list_repeated,
)
from megatron_llep.offline.paper.fit import split_halves

BEGIN = "<!-- made by tools/paper_curves.py -->"
END = "<!-- end of what tools/paper_curves.py makes -->"
_WIDTH = 104


def make_section(comparison: Comparison) -> str:
    """All that stands between the markers."""
    parts = [
        _make_words(comparison),
        _make_errors(comparison),
        "Each cell: the paper / the cost model as it is / with the fixed cost. 30% into 4: of the\n"
        "(token, expert) pairs, into 4 experts, on the first rank or ranks.",
        *(_make_figure(comparison, figure) for figure in (*FITTED, *OTHERS)),
    ]
    return "\n\n".join(parts) + "\n"


def replace_section(page: str, section: str) -> str:
    """The page with a new section between its markers.

    Raises:
        ValueError: the page does not have both markers, once each and in order.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in after:
        raise ValueError(f"the page needs {BEGIN} and, below it, {END}, once each")
    return f"{before}{BEGIN}\n\n{section}\n{END}{after}"


def _make_figure(comparison: Comparison, figure: Figure) -> str:
    """A table of paper / as it is / with the fixed cost."""

    def show(point: Point) -> str:
        return " / ".join(f"{n:.2f}" for n in (point.speedup, *comparison.speedups(point)))

    rows = [[row, *map(show, points)] for row, points in figure.rows.items()]
    return _make_table([[f"Figure {figure.name}, {figure.corner}", *figure.columns], *rows])


def _make_errors(comparison: Comparison) -> str:
    """A table of how far the predictions are from the points that were not fitted."""
    _, tested = split_halves(FITTED)
    chosen = {id(point) for point in tested}  # settings repeat, points do not
    sets = {"all points kept from the fit": tested}
    for figure in FITTED:
        sets[f"of these, Figure {figure.name}"] = [p for p in figure.points if id(p) in chosen]
    for i, model in enumerate(FIGURE_4.columns):
        sets[f"Figure 4, {model}"] = [points[i] for points in FIGURE_4.rows.values()]
    for figure in (FIGURE_6B, FIGURE_7A):
        sets[f"Figure {figure.name}"] = figure.points
    head = ["median", "worst", "above the paper"]
    rows = [["error of the speed-up", "points", f"as it is: {head[0]}", *head[1:]]]
    rows[0] += [f"with the fixed cost: {head[0]}", *head[1:]]
    for name, points in sets.items():
        cells = [name, f"{len(points)}"]
        for each in comparison.agree(points):
            cells += [f"{each.median:.0%}", f"{each.worst:.0%}", f"{each.above}"]
        rows.append(cells)
    return _make_table(rows)


def _make_words(comparison: Comparison) -> str:
    """What the figures say, in words with their numbers."""
    fitted, tested = split_halves(FITTED)
    as_it_is, fixed = comparison.agree(tested)
    few = [p for p in FIGURE_9.points if p.setting.num_experts < 128]
    at_4k, at_8k = FIGURE_6A.rows["30% into 4"][:2]
    models = {
        model: comparison.agree([row[i] for row in FIGURE_4.rows.values()])[1]
        for i, model in enumerate(FIGURE_4.columns)
    }
    gpt, deepseek, kimi = models.values()
    even = [
        point.speedup
        for figure in OTHERS
        for point in figure.points
        if not comparison.predictions[point.setting].lends
    ]
    apart = max(speedups[-1] / speedups[0] for speedups in list_repeated((*FITTED, *OTHERS))) - 1
    lines = (
        f"The fixed cost is {comparison.fixed_seconds * 1e3:.1f} ms for each layer that lends, "
        f"fitted on {len(fitted)} of the {len(fitted) + len(tested)} points of Figures 6a, 7b "
        f"and 9, every second one as on a chessboard. On the other {len(tested)} the error of "
        f"the speed-up is {fixed.median:.0%} (median) and {fixed.worst:.0%} (worst); of the "
        f"cost model as it is {as_it_is.median:.0%} and {as_it_is.worst:.0%}.",
        f"**As it is the model is optimistic**, at {as_it_is.above} of these {len(tested)} "
        f"points. It says what the machine allows, with "
        f"{comparison.cost.planning_seconds * 1e3:.1f} ms for planning. With 30% into 4 experts "
        f"it predicts {comparison.speedups(at_4k)[0]:.2f} at {at_4k.setting.tokens:,} tokens, "
        f"where the paper has {at_4k.speedup:.2f}; with the fixed cost "
        f"{comparison.speedups(at_8k)[1]:.2f} at {at_8k.setting.tokens:,}, where it has "
        f"{at_8k.speedup:.2f}.",
        f"With it, Figure 4's gpt-oss-120b, of which no point was fitted, is met within "
        f"{gpt.worst:.0%}.",
        f"**It stays optimistic** for DeepSeek-V3 (median {deepseek.median:.0%}) and Kimi-K2 "
        f"({kimi.median:.0%}), and in Figure 9 below 128 experts "
        f"({comparison.agree(few)[1].median:.0%}, worst {comparison.agree(few)[1].worst:.0%}). "
        "No cost that is the same for all layers explains these; why was not found out.",
        f"Where nothing is lent ours is 1.00; the paper has {min(even):.2f} to {max(even):.2f}, by "
        "which its fall-back differs from its plain expert parallelism.",
        f"The paper's own values of one setting, in four of its figures, are up to {apart:.0%} "
        "apart.",
    )
    return "\n".join(
        textwrap.fill(f"- {line}", _WIDTH, subsequent_indent="  ", break_on_hyphens=False)
        for line in lines
    )


def _make_table(rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table whose first row is its head."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    columns = lines[0].count(" | ") + 1
    return "\n".join([lines[0], "|---" * columns + "|", *lines[1:]])
