"""The demo's figures for people: a table in the terminal and one self-contained HTML page."""

import base64
import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from demo_measure import losses_agree
from demo_plan import Device, Run

Row = tuple[str, str, str, str]
"""Figure, plain EP, LLEP, and what the two say together."""

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #333; max-width: 60rem; margin: 2rem auto;
       padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
img { width: 100%; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: right; padding: .35rem .6rem; border-bottom: 1px solid #e4e4e4; }
th:first-child, td:first-child { text-align: left; }
td:last-child { color: #666; }
pre { background: #f6f6f6; padding: .8rem; overflow-x: auto; font-size: .8rem;
      white-space: pre-wrap; word-break: break-all; }
.good { color: #1d6a96; } .bad { color: #b3261e; font-weight: bold; }
"""


def make_rows(summary: dict[str, Any]) -> list[Row]:
    """The table: one row a figure."""
    s = summary
    first, last = s["step_time_over_steps"]

    def ratio(value: float) -> str:
        return f"{value:.2f}x"

    rows = [
        (
            "loss, last step",
            f"{s['loss_last']['plain']:.5f}",
            f"{s['loss_last']['llep']:.5f}",
            f"apart by at most {s['loss_max_rel_diff']:.1e} (allowed {s['loss_tolerance']:.0e})",
        ),
        (
            "imbalance, worst step and layer",
            f"{s['imbalance_before_max']:.2f}",
            f"{s['imbalance_after_max']:.2f}",
            "1 is perfect balance",
        ),
        (
            f"imbalance, worst layer, median of {s['phases'][-1]['name']}",
            f"{s['imbalance_before_median']:.2f}",
            f"{s['imbalance_after_median']:.2f}",
            "",
        ),
        (
            "most (token, expert) pairs a rank computed",
            f"{s['tokens_max']['plain']:.0f}",
            f"{s['tokens_max']['llep']:.0f}",
            ratio(s["tokens_max_ratio"]),
        ),
        (
            f"step time, median of steps {first}-{last}",
            f"{s['step_time_ms']['plain']:.0f} ms",
            f"{s['step_time_ms']['llep']:.0f} ms",
            ratio(s["step_time_ratio"]),
        ),
        (
            "peak memory of the worst rank",
            f"{s['peak_memory_mib']['plain']:.0f} MiB",
            f"{s['peak_memory_mib']['llep']:.0f} MiB",
            ratio(s["peak_memory_ratio"]),
        ),
    ]
    of_steps = s["peak_memory_of_steps_mib"]
    if of_steps["plain"] is not None:
        rows.append(
            (
                "  of which by the training steps",
                f"{of_steps['plain']:.0f} MiB",
                f"{of_steps['llep']:.0f} MiB",
                ratio(of_steps["plain"] / of_steps["llep"]),
            )
        )
    rows.append(
        (
            f"weights lent a step, mean of {s['phases'][-1]['name']}",
            "0",
            f"{s['lent_mib_per_step']:.1f} MiB",
            f"{s['lent_experts_per_step']:.1f} experts; {s['lent_mib_total']:.0f} MiB in all",
        )
    )
    return rows


def format_table(rows: Sequence[Row]) -> str:
    """The table as text."""
    table = [("", "plain EP", "LLEP", ""), *rows]
    widths = [max(len(row[column]) for row in table) for column in range(3)]
    lines = []
    for name, plain, llep, note in table:
        line = f"{name:<{widths[0]}}  {plain:>{widths[1]}}  {llep:>{widths[2]}}  {note}"
        lines.append(line.rstrip())
    lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join(lines)


def format_verdict(summary: dict[str, Any]) -> str:
    """Whether the loss curves are the same, in one sentence."""
    apart = (
        f"at most {summary['loss_early_max_rel_diff']:.1e} apart (relative) over the first "
        f"{summary['loss_early_steps']} steps, {summary['loss_early_tolerance']:.0e} allowed; "
        f"{summary['loss_max_rel_diff']:.1e} over all, {summary['loss_tolerance']:.0e} allowed."
    )
    if losses_agree(summary):
        return f"The loss curves agree: {apart}"
    return f"THE LOSS CURVES PART, which LLEP must not do: {apart}"


def explain(summary: dict[str, Any], device: Device) -> dict[str, str]:
    """How each figure was measured, for the page and summary.json."""
    first, last = summary["step_time_over_steps"]
    if device.name == "cpu":
        memory = (
            "Highest resident size (VmHWM) of a rank's process from its first step on, less what "
            "it held before the model was built (Python, libraries, process groups): weights, "
            "gradients, optimizer, activations, lent experts. The larger of both phases, the worst "
            "rank. 'By the training steps' is the same less what the process held right before "
            "its first step."
        )
    else:
        memory = "torch.cuda.max_memory_allocated, the larger of both phases, the worst rank."
    return {
        "loss": "lm loss of every step, from the TensorBoard logs; its relative difference is "
        "|plain - LLEP| / plain. The two trainings add the same numbers in another order, and "
        "training multiplies such rounding differences, so the first steps are held to a tighter "
        "bound than the later ones.",
        "imbalance": "Tokens of the most loaded rank / mean over ranks, of each layer. 'Plain EP' "
        "is what the routing of the LLEP run asks of the ranks before it is balanced.",
        "tokens": "(token, expert) pairs that a rank's experts compute in one layer, mean over the "
        "micro-batches of a step; most over steps, layers and ranks.",
        "step time": f"Megatron's own time of an iteration, median over steps {first} to {last}.",
        "memory": memory,
        "lent": "Weights sent, summed over layers, micro-batches averaged; as many gradients come "
        "back.",
    }


def write_report(summary: dict[str, Any], runs: Sequence[Run], image: Path, path: Path) -> None:
    """Write the page; the picture is inside it and nothing is loaded from elsewhere."""
    escape = html.escape
    cells = "\n".join(
        "<tr>" + "".join(f"<td>{escape(cell.strip())}</td>" for cell in row) + "</tr>"
        for row in make_rows(summary)
    )
    machine = "".join(
        f"<tr><td>{escape(name)}</td><td>{escape(str(value))}</td></tr>"
        for name, value in summary["machine"].items()
    )
    measured = "".join(
        f"<dt><b>{escape(name)}</b></dt><dd>{escape(text)}</dd>"
        for name, text in summary["how_measured"].items()
    )
    commands = "\n\n".join(f"# {run.title}\n{run.shell}" for run in runs)
    picture = base64.b64encode(image.read_bytes()).decode()
    tone = "good" if losses_agree(summary) else "bad"
    phases = ", then ".join(
        f"steps {phase['first_step']} to {phase['last_step']} on {phase['name']}"
        for phase in summary["phases"]
    )
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Plain EP and LLEP</title>
<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body>
<h1>Plain expert parallelism and LLEP, side by side</h1>
<p>The same mixture-of-experts model, seed and data, trained twice with {escape(summary["layout"])}:
{escape(phases)}. No auxiliary loss, no forced routing.</p>
<p class="{tone}">{escape(format_verdict(summary))}</p>
<table><tr><th></th><th>plain EP</th><th>LLEP</th><th></th></tr>
{cells}</table>
<p><img alt="Curves of both runs" src="data:image/png;base64,{picture}"></p>
<h2>How it was measured</h2><dl>{measured}</dl>
<h2>Machine</h2><table>{machine}</table>
<h2>Commands</h2><pre>{escape(commands)}</pre>
</body></html>
"""
    path.write_text(page, encoding="utf-8")
