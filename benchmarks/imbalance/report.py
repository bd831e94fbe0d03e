"""The page of the benchmark: one table, one picture, and how both were measured."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.imbalance.names import FORCED, METHODS, MODES, PLAIN
from benchmarks.imbalance.rows import Row
from benchmarks.imbalance.workloads import BURST_EVERY, WORKLOADS
from megatron_llep.offline.report import figure as look

COLORS = (look.CONTROL, look.PLAIN, *look.METHODS)
"""Of forced balance, plain Megatron, and others in their order."""


def format_table(rows: Sequence[Row]) -> list[str]:
    """A Markdown table, a line for each workload and method; all modes side by side.

    What is not a time is of the last mode, which does most.
    """
    modes = list(dict.fromkeys(row.mode for row in rows))
    by_key = {(row.mode, row.workload, row.method): row for row in rows}
    head = [
        "workload",
        "method",
        *(f"{mode}: time / forced" for mode in modes),
        f"{modes[-1]}: ms",
        "worst rank's pairs",
        "/ mean",
        "tokens MB",
        "weights MB",
        "placed once MB",
        "peak MiB",
        "/ forced",
    ]
    lines = [_line(head), _line(["---"] * 2 + ["---:"] * (len(head) - 2))]
    for row in rows:
        if row.mode != modes[-1]:
            continue
        ratios = [by_key[mode, row.workload, row.method].to_forced for mode in modes]
        lines.append(
            _line(
                [
                    row.workload,
                    row.method,
                    *(f"{ratio:.2f}" for ratio in ratios),
                    f"{row.seconds * 1e3:.1f}",
                    row.worst_pairs,
                    f"{row.imbalance:.2f}",
                    *(
                        f"{each / 1e6:.2f}"
                        for each in (row.token_bytes, row.weight_bytes, row.placed_bytes)
                    ),
                    f"{row.peak_bytes / 2**20:.1f}",
                    f"{row.peak_to_forced:.2f}",
                ]
            )
        )
    return lines


def format_page(record: Mapping[str, Any], rows: Sequence[Row], picture: str) -> str:
    """The whole page, in Markdown."""
    modes = list(dict.fromkeys(row.mode for row in rows))
    methods = list(dict.fromkeys(row.method for row in rows))
    workloads = list(dict.fromkeys(row.workload for row in rows))
    lines = [
        "# Token imbalance: what each method makes of it",
        "",
        "Written by `python -m benchmarks.imbalance`; do not edit. Workloads W0 to W7 and the "
        "three modes are after the benchmark that Megatron-LM's pull request 7488 proposes; "
        "definitions and code are this project's.",
        "",
        f"- command: `{record['command']}`",
        f"- machine: {record['machine']}",
        f"- load when it started: {record['load']}",
        f"- sizes: {record['described']}",
        f"- oracle: {record['checked']} runs checked, each pair's place and weight, outputs and "
        f"gradients; largest difference from the reference {max(r.off_by for r in rows):.1e}",
        "",
        f"![Four panels by workload and method]({picture})",
        "",
        f"Pairs, bytes and memory are of mode `{modes[-1]}`; all modes are in the JSON file.",
        "",
        *format_table(rows),
        "",
        "## Workloads",
        "",
        *(f"- {name}, {WORKLOADS[name].summary}" for name in workloads),
        "",
        "A routing follows from (workload, seed, step) and the sizes alone; every token has "
        "exactly top-k different experts, and rows are dealt out to the ranks in turn, so that an "
        "expert's come from all. The JSON file has a digest of every workload's routings. "
        "Megatron's router refuses a rank without a token, so W5 has a rank whose experts have "
        "none, and W4 ranks with few.",
        "",
        "## Methods",
        "",
        *(f"- `{name}`: {METHODS[name]}" for name in methods),
        "",
        f"LLEP's `lla` lends for {record['lla_min_tokens']} pairs or more: half of what an expert "
        "has on average, and at most the paper's 1,024. EPLB's placement is made once, by "
        f"the loads of the {record['history']} steps before the first; `eplb+replicas` adds up the "
        "gradients of replicas in one all-reduce over all ranks, which is in its time.",
        "",
        "## Modes",
        "",
        *(f"- `{name}`: {MODES[name]}" for name in modes),
        "",
        "## How it was measured",
        "",
        *(f"- {line}" for line in describe_method(record)),
        "",
    ]
    return "\n".join(lines)


def describe_method(record: Mapping[str, Any]) -> list[str]:
    """How times, memory and bytes come about, a sentence for each."""
    return [
        f"Time: {record['rounds']} rounds after one that warms up. In a round every method runs "
        f"all {record['steps']} steps, in the same processes; each round begins with another "
        "method. Before each step there is a barrier; a step takes what its slowest rank takes, a "
        f"round the mean of its steps, so W7's burst (every {BURST_EVERY}th step) counts with its "
        "weight. Shown is the median over rounds; of ratios, that of the ratio within a round.",
        f"Ranks: {record['ranks']}.",
        "Oracle: before anything is timed each step of each method runs under watch. A token is "
        "known by its own numbers, an expert by the numbers of its weights, as the expert's module "
        "is given them; so it is seen which pair was computed on which rank with which weight, "
        "and compared with the routing and with what the method says (in mode dispatch, where no "
        "expert runs, an expert is known by the slot that rows are sorted to). Outputs, gradients "
        "of input, router and all experts, and in training what was added to the weights, are "
        "compared with a float64 reference that has no dispatcher, to "
        f"{record['tolerance']:.0e} of the largest number. If anything differs, the run ends with "
        "an error.",
        "Bytes: counted, not measured. Tokens: pairs that the oracle saw on another rank than "
        "their token's, times the numbers of a row, there and back, in forward and backward, and "
        "the weights of pairs. Weights: of the plan's lent experts, and their fp32 gradients; of "
        "replicas, a ring all-reduce of their gradients. Counts of pairs and DDP's sum of the "
        "router's gradient are left out. Placed once: experts, in training with their momentum, "
        "that EPLB puts elsewhere than at home, before the first step; not in any time.",
        f"Peak memory: {record['memory']} It is of the worst rank, in a run of its own in which "
        "the layer is built and all steps run: weights, gradients, optimizer state, activations, "
        "lent experts, buffers. The batch itself is not in it.",
    ]


def draw(rows: Sequence[Row], caption: str, path: Path) -> None:
    """Write the picture: time, worst rank, bytes and memory, by workload, of the last mode.

    Raises:
        ImportError: matplotlib is missing; names the extra.
    """
    mode = rows[-1].mode
    rows = [row for row in rows if row.mode == mode]
    workloads = list(dict.fromkeys(row.workload for row in rows))
    by_method: dict[str, list[Row]] = {}
    for row in rows:
        by_method.setdefault(row.method, []).append(row)
    forced = {row.workload: row for row in by_method[FORCED]}
    panels = {
        "time / forced balance": lambda row: row.to_forced,
        "pairs of the worst rank / mean": lambda row: row.imbalance,
        "bytes between ranks / forced balance": lambda row: (
            row.moved_bytes / max(forced[row.workload].moved_bytes, 1)
        ),
        "peak memory of the worst rank / forced balance": lambda row: row.peak_to_forced,
    }
    with look.open_figure(path, (13, 8), rows=2, columns=2) as (figure, axes):
        for panel, (title, value) in zip(axes.flat, panels.items(), strict=True):
            heights = {
                "plain Megatron" if name == PLAIN else name: [value(row) for row in of_one]
                for name, of_one in by_method.items()
            }
            look.draw_bars(panel, heights, COLORS)
            panel.set_title(title)
            labels = [f"{name}\n{_explain(name)}" for name in workloads]
            panel.set_xticks(range(len(workloads)), labels, fontsize=7)
        handles, labels = axes.flat[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), fontsize=9)
        figure.supxlabel(caption, fontsize=7, color="#666666")


def _explain(workload: str) -> str:
    return WORKLOADS[workload].summary.partition(":")[0].replace(" ", "\n")


def _line(cells: Sequence[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"
