"""A simulation's results for people: tables, a picture, and one self-contained HTML page."""

from dataclasses import dataclass
from pathlib import Path

from megatron_llep.offline.report.figure import METHODS, draw_bars, open_figure
from megatron_llep.offline.report.page import make_picture, make_table, make_text, write_page
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


def group_by_model(results: list[Result]) -> dict[str, list[Result]]:
    """The results of each model, headed by its name and what a rank gets."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(result.model, []).append(result)
    return {
        f"{model}, {of_model[0].tokens_per_rank} tokens a rank": of_model
        for model, of_model in groups.items()
    }


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
    several_nodes = any(outcome.across_gigabytes for outcome in result.outcomes.values())
    if several_nodes:
        rows[0] += ["across nodes GB", "busiest link GB"]
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
        if several_nodes:
            rows[-1] += [f"{o.across_gigabytes:.2f}", f"{o.busiest_gigabytes:.2f}"]
    return rows


def draw_speedups(results: list[Result], output: Path) -> None:
    """Draw a panel for each model: the methods' speed-up over plain EP by routing.

    Raises:
        ImportError: matplotlib is missing.
    """
    groups = group_by_model(results)
    size = (max(6.0, 0.9 * max(map(len, groups.values())) + 2), 3.4 * len(groups))
    with open_figure(output, size, rows=len(groups)) as (_, axes):
        for panel, (head, rows) in zip(axes.flat, groups.items(), strict=True):
            methods = [method for method in rows[0].outcomes if method != "plain"]
            speedups = {m: [layer_speedup(row, m) for row in rows] for m in methods}
            draw_bars(panel, speedups, [_choose_color(m, methods) for m in methods])
            panel.set_xticks(range(len(rows)), [row.label for row in rows], rotation=30, ha="right")
            panel.set(title=head, ylabel="layer: plain EP / method")
        axes[0, 0].legend(fontsize=8, ncols=4)


def _choose_color(method: str, methods: list[str]) -> str:
    return "0.8" if method == "optimum" else METHODS[methods.index(method)]


def write_html(
    output: Path, results: list[Result], picture: Path, machine: str, command: str
) -> None:
    """One HTML page with the picture and all tables."""
    parts = [
        make_text(f"Predicted, not measured. Machine: {machine}."),
        make_text(command, "pre"),
        make_picture(picture, "Speed-up of each method"),
    ]
    for head, of_model in group_by_model(results).items():
        parts += [make_text(head, "h2"), make_table(make_speedup_table(of_model))]
        for result in of_model:
            parts += [make_text(result.label, "h3"), make_table(make_detail_table(result))]
    write_page(output, "Expert parallelism, simulated", parts)
