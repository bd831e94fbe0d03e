"""`plan`: make one plan, and show it as a table and a picture."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megatron_llep.offline.cli.replay import Replay, open_if_recording
from megatron_llep.offline.cli.routing import (
    add_routing_arguments,
    list_workloads,
    trace_counts,
    workload_counts,
)
from megatron_llep.offline.nodes import Nodes, find_nodes
from megatron_llep.offline.report.table import format_table
from megatron_llep.planner import PLANNERS, Plan, make_plan
from megatron_llep.planner.prices import Prices

if TYPE_CHECKING:
    from megatron_llep.offline.recording import RecordedLayer

RANKS, EXPERTS = 8, 64
"""Of a workload, or of Megatron's trace, where nothing else is asked for."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = list_workloads()
    parser.add_argument("--workload", default="lognormal-2", help="default: %(default)s")
    parser.add_argument(
        "--ranks", type=int, metavar="P", help=f"default: {RANKS}, or the recording's"
    )
    parser.add_argument(
        "--experts", type=int, metavar="E", help=f"default: {EXPERTS}, or the recording's"
    )
    parser.add_argument(
        "--tokens", type=int, default=4096, metavar="T", help="of a rank; default: %(default)s"
    )
    parser.add_argument(
        "--top-k", type=int, default=4, metavar="K", help="experts a token; default: %(default)s"
    )
    parser.add_argument(
        "--step",
        type=int,
        default=0,
        help="of the workload; or the micro-batch of the trace, from 0, all groups' in a row",
    )
    parser.add_argument("--layer", type=int, default=0, help="of the trace, in its order, from 0")
    add_routing_arguments(parser)
    parser.add_argument(
        "--planner", choices=[p for p in PLANNERS if p not in ("lp", "auto")], default="tolerant"
    )
    parser.add_argument("--max-foreign", type=int, help="most experts a rank may borrow")
    parser.add_argument(
        "--tolerance", type=float, default=0.05, help="planner tolerant; default: %(default)s"
    )
    parser.add_argument("--output", type=Path, help="picture: a .png or .svg file")


def run(args: argparse.Namespace) -> int:
    """Print the plan, and draw it if asked to."""
    counts, ran = _find_counts(args)
    nodes = find_nodes(
        args.ranks_per_node, len(counts), None if ran is None else ran.ranks_per_node
    )
    plan = make_plan(
        counts,
        planner=args.planner,
        max_foreign=args.max_foreign,
        tolerance=args.tolerance,
        topology=nodes.topology,
        prices=None if ran is None else ran.prices,
    )
    print(describe_plan(plan, ran, nodes))
    if args.output:
        from megatron_llep.offline.cli.plan_picture import draw_plan

        draw_plan(plan, args.output)
        print(f"picture: {args.output}")
    return 0


def _find_counts(args: argparse.Namespace) -> tuple[np.ndarray, "Ran | None"]:
    """[P, E], and what ran if they were recorded."""
    recording = open_if_recording(args.trace) if args.trace else None
    if recording is not None:
        replay = Replay.of(recording, num_ranks=args.ranks, num_experts=args.experts)
        _check_place(args, replay.layers, replay.batches)
        row = replay.read(args.layer, args.step)
        shape = recording.info.shape
        ran = Ran(
            row=row,
            planner=recording.info.planner,
            ranks_per_node=replay.ranks_per_node,
            prices=None if shape is None else shape.prices,
        )
        return replay.split(row.counts), ran
    ranks = RANKS if args.ranks is None else args.ranks
    experts = EXPERTS if args.experts is None else args.experts
    if args.trace:
        of_trace, layers, batches = trace_counts(args.trace, ranks, experts)
        _check_place(args, layers, batches)
        return of_trace(args.layer, args.step), None
    of_workload = workload_counts(
        args.workload,
        num_ranks=ranks,
        num_experts=experts,
        tokens=args.tokens,
        top_k=args.top_k,
        seed=args.seed,
        repeat_experts=args.repeat_experts,
    )
    return of_workload(0, args.step), None


def _check_place(args: argparse.Namespace, layers: int, batches: int) -> None:
    if not (0 <= args.layer < layers and 0 <= args.step < batches):
        raise ValueError(
            f"--layer {args.layer} --step {args.step}: the trace has {layers} layers and "
            f"{batches} micro-batches"
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Ran:
    """What ran when the counts were recorded."""

    row: "RecordedLayer"
    planner: str
    ranks_per_node: int | None
    """None where nobody knows."""
    prices: Prices | None
    """Of its layer's loans; None where its sizes are not known."""

    def describe(self) -> str:
        """In a line."""
        row, plan = self.row, self.row.plan
        what = f"{plan.imbalance_before:.3f} -> {plan.imbalance_after:.3f} x mean"
        return (
            f"as it ran, planner {self.planner}: {what}; {len(plan.transfers)} experts lent (step "
            f"{row.step}, micro-batch {row.micro_batch}, group {row.group}, layer {row.layer})"
        )


def describe_plan(plan: Plan, ran: Ran | None = None, nodes: Nodes | None = None) -> str:
    """The plan as a table: a row for each rank.

    Args:
        plan: to be shown.
        ran: shown beside it; its loads only where its ranks are the plan's.
        nodes: named where there are several.
    """
    before, after = plan.load_per_rank_before, plan.load_per_rank_after
    _, home, _ = plan.transfers.T
    lent = np.bincount(home, minlength=plan.num_ranks)
    rows: list[list[object]] = [["rank", "before", "after", "lends", "borrows (expert: pairs)"]]
    for rank, foreign in enumerate(plan.foreign_experts):
        borrowed = ", ".join(f"{e}: {plan.quota[e, rank]}" for e in foreign[foreign >= 0])
        rows.append([rank, before[rank], after[rank], lent[rank], borrowed])
    align = ">>>><"
    loads = [] if ran is None else ran.row.plan.load_per_rank_after.tolist()
    if len(loads) == plan.num_ranks:
        align = ">>>>><"
        rows = [[*row[:3], load, *row[3:]] for row, load in zip(rows, ["ran", *loads], strict=True)]
    several = "" if nodes is None or nodes.number == 1 else f" ({nodes})"
    return (
        f"{plan.num_ranks} ranks{several}, {plan.num_experts} experts, {before.sum()} "
        f"(token, expert) pairs, {before.sum() / plan.num_ranks:.0f} a rank on average\n"
        f"largest load: {plan.imbalance_before:.3f} -> {plan.imbalance_after:.3f} x mean; "
        f"{len(plan.transfers)} experts lent, at most {plan.max_foreign} to a rank\n"
        + (f"{ran.describe()}\n" if ran is not None else "")
        + "\n"
        + format_table(rows, align)
    )
