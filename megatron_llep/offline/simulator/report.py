"""A simulation's results for people: tables, a picture, and one self-contained HTML page."""

import base64
import html
import io
from dataclasses import dataclass
from typing import Any

from megatron_llep.offline.simulator.run import Outcome


@dataclass(frozen=True, kw_only=True)
class Result:
    """All methods for one model, routing and number of ranks."""

    model: str
    routing: str
    num_ranks: int
    tokens_per_rank: int
    outcomes: dict[str, Outcome]

    @property
    def label(self) -> str:
        """What distinguishes it from others of the same model."""
        return f"{self.routing}, EP {self.num_ranks}"


def layer_speedup(result: Result, method: str) -> float:
    """Seconds of a layer under plain expert parallelism / under the method."""
    return result.outcomes["plain"].layer.total / result.outcomes[method].layer.total


def make_speedup_table(results: list[Result]) -> list[list[str]]:
    """A row for each result: imbalance and layer time under plain EP, speed-up of each method."""
    methods = [method for method in results[0].outcomes if method != "plain"]
    rows = [["routing", "imbalance", "plain ms", *methods]]
    for result in results:
        plain = result.outcomes["plain"]
        speedups = [f"{layer_speedup(result, method):.2f}x" for method in methods]
        rows.append(
            [result.label, f"{plain.imbalance:.2f}", f"{plain.layer.total * 1e3:.1f}", *speedups]
        )
    return rows


def make_detail_table(result: Result) -> list[list[str]]:
    """A row for each method: time by what it is spent on, memory, traffic."""
    head = "method,imbalance,moved,compute,exchange,lend,return,plan,layer ms,speed-up,step s"
    rows = [[*head.split(","), "step speed-up", "layer GB", "model GB", "token GB", "expert GB"]]
    plain = result.outcomes["plain"]
    for method, o in result.outcomes.items():
        parts = (o.layer.compute, o.layer.exchange, o.layer.lending, o.layer.returning)
        rows.append(
            [
                method,
                f"{o.imbalance:.2f}",
                f"{o.transfers:.1f}",
                *(f"{seconds * 1e3:.2f}" for seconds in (*parts, o.layer.planning)),
                f"{o.layer.total * 1e3:.2f}",
                f"{layer_speedup(result, method):.2f}x",
                f"{o.step_seconds:.3f}",
                f"{plain.step_seconds / o.step_seconds:.2f}x",
                f"{o.layer_bytes / 1e9:.2f}",
                f"{o.model_bytes / 1e9:.1f}",
                f"{o.token_gigabytes:.2f}",
                f"{o.expert_gigabytes:.2f}",
            ]
        )
    return rows


def format_table(rows: list[list[str]]) -> str:
    """Columns, the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        first, *rest = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join([first.lstrip().ljust(widths[0]), *rest]))
    return "\n".join(lines)


def draw_speedups(plt: Any, results: list[Result]) -> Any:
    """A figure with a panel for each model: the methods' speed-up over plain EP by routing."""
    models = list(dict.fromkeys(result.model for result in results))
    most = max(sum(result.model == model for result in results) for model in models)
    size = (max(6.0, 0.9 * most + 2), 3.2 * len(models))
    figure, axes = plt.subplots(len(models), 1, figsize=size, layout="constrained", squeeze=False)
    for panel, model in zip(axes[:, 0], models, strict=True):
        rows = [result for result in results if result.model == model]
        methods = [method for method in rows[0].outcomes if method != "plain"]
        for i, method in enumerate(methods):
            panel.bar(
                [x + (i + 0.5) * 0.8 / len(methods) - 0.4 for x in range(len(rows))],
                [layer_speedup(row, method) for row in rows],
                width=0.8 / len(methods),
                label=method,
                color="0.8" if method == "optimum" else None,
            )
        panel.axhline(1, color="black", linewidth=0.8)
        panel.set_xticks(range(len(rows)), [row.label for row in rows], rotation=30, ha="right")
        panel.set_title(f"{model}, {rows[0].tokens_per_rank} tokens a rank", fontsize=10)
        panel.set_ylabel("layer: plain EP / method")
        panel.spines[["top", "right"]].set_visible(False)
    axes[0, 0].legend(fontsize=8, ncols=4)
    return figure


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 80rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; font-size: .85rem; margin-bottom: 2rem; }
th, td { text-align: right; padding: .2rem .6rem; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; }
img { max-width: 100%; }
"""


def make_page(results: list[Result], figure: Any, machine: str, command: str) -> str:
    """One HTML page with the picture and all tables."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    parts = [
        f"<p>Predicted, not measured. Machine: {html.escape(machine)}.</p>",
        f"<pre>{html.escape(command)}</pre>",
        f'<img src="data:image/png;base64,{base64.b64encode(picture.getvalue()).decode()}">',
    ]
    for model in dict.fromkeys(result.model for result in results):
        of_model = [result for result in results if result.model == model]
        parts += [f"<h2>{html.escape(model)}</h2>", _to_html(make_speedup_table(of_model))]
        for result in of_model:
            parts += [f"<h3>{html.escape(result.label)}</h3>", _to_html(make_detail_table(result))]
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>megatron_llep simulate'
        f"</title><style>{_STYLE}</style><h1>Expert parallelism, simulated</h1>"
        + "\n".join(parts)
        + "</html>\n"
    )


def _to_html(rows: list[list[str]]) -> str:
    head, *body = [
        "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row)
        for tag, row in zip(["th", *["td"] * len(rows)], rows, strict=False)
    ]
    return f"<table><tr>{head}</tr>" + "".join(f"<tr>{row}</tr>" for row in body) + "</table>"
