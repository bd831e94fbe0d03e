"""`plan`: make one plan, and show it as a table and a picture."""

import argparse
from pathlib import Path

import numpy as np

from megatron_llep.offline.cli.routing import (
    add_routing_arguments,
    list_workloads,
    make_topology,
    trace_counts,
    workload_counts,
)
from megatron_llep.offline.report.table import format_table
from megatron_llep.planner import PLANNERS, Plan, make_plan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = list_workloads()
    parser.add_argument("--workload", default="lognormal-2", help="default: %(default)s")
    parser.add_argument("--ranks", type=int, default=8, metavar="P", help="default: %(default)s")
    parser.add_argument("--experts", type=int, default=64, metavar="E", help="default: %(default)s")
    parser.add_argument(
        "--tokens", type=int, default=4096, metavar="T", help="of a rank; default: %(default)s"
    )
    parser.add_argument(
        "--top-k", type=int, default=4, metavar="K", help="experts a token; default: %(default)s"
    )
    parser.add_argument("--step", type=int, default=0, help="of the workload or trace")
    parser.add_argument("--layer", type=int, default=0, help="of the trace, in its order")
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
    topology = make_topology(args.ranks_per_node, args.ranks)
    if args.trace:
        of_trace, layers, batches = trace_counts(args.trace, args.ranks, args.experts)
        if not (0 <= args.layer < layers and 0 <= args.step < batches):
            raise ValueError(
                f"--layer {args.layer} --step {args.step}: the trace has {layers} layers and "
                f"{batches} micro-batches"
            )
        counts = of_trace(args.layer, args.step)
    else:
        counts = workload_counts(
            args.workload,
            num_ranks=args.ranks,
            num_experts=args.experts,
            tokens=args.tokens,
            top_k=args.top_k,
            seed=args.seed,
            repeat_experts=args.repeat_experts,
        )(0, args.step)
    plan = make_plan(
        counts,
        planner=args.planner,
        max_foreign=args.max_foreign,
        tolerance=args.tolerance,
        topology=topology,
    )
    print(describe_plan(plan))
    if args.output:
        from megatron_llep.offline.cli.plan_picture import draw_plan

        draw_plan(plan, args.output)
        print(f"picture: {args.output}")
    return 0


def describe_plan(plan: Plan) -> str:
    """The plan as a table: a row for each rank."""
    before, after = plan.load_per_rank_before, plan.load_per_rank_after
    _, home, _ = plan.transfers.T
    lent = np.bincount(home, minlength=plan.num_ranks)
    rows: list[list[object]] = [["rank", "before", "after", "lends", "borrows (expert: pairs)"]]
    for rank, foreign in enumerate(plan.foreign_experts):
        borrowed = ", ".join(f"{e}: {plan.quota[e, rank]}" for e in foreign[foreign >= 0])
        rows.append([rank, before[rank], after[rank], lent[rank], borrowed])
    return (
        f"{plan.num_ranks} ranks, {plan.num_experts} experts, {before.sum()} (token, expert) "
        f"pairs, {before.sum() / plan.num_ranks:.0f} a rank on average\n"
        f"largest load: {plan.imbalance_before:.3f} -> {plan.imbalance_after:.3f} x mean; "
        f"{len(plan.transfers)} experts lent, at most {plan.max_foreign} to a rank\n\n"
        + format_table(rows, ">>>><")
    )
