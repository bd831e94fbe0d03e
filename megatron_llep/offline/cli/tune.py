"""`tune`: from a recording of a run's routing to the best settings, or to none."""

import argparse
from pathlib import Path

from megatron_llep.offline.nodes import Nodes, find_nodes, make_topology
from megatron_llep.offline.report.progress import start_progress
from megatron_llep.offline.simulator.models import MODELS, get_model
from megatron_llep.offline.tune import (
    Replayer,
    Sample,
    choose,
    list_nodes,
    make_grid,
    read_sample,
    search,
)
from megatron_llep.offline.tune.choose import MARGIN, MOST_SLOWER
from megatron_llep.offline.tune.model import find_shape, predict_others
from megatron_llep.offline.tune.replay import drop_threshold
from megatron_llep.offline.tune.settings import keep_settings
from megatron_llep.planner.cost.model import LayerCost
from megatron_llep.planner.cost.presets import PRESETS, get_cost_model

_DEFAULT_MACHINE = "h200"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    parser.description = (
        "Replay the routing of a run through the cost model under many settings: planners, "
        "tolerance, thresholds, bounds on foreign experts, nodes. Print the best, the runner-up, "
        "what is gained in which micro-batches, and when not to switch on. It says to leave it "
        "off where the median micro-batch gains less than --margin, where more than "
        f"{MOST_SLOWER:.0%}".replace("%", "%%")
        + " are slower, or where planning alone might eat "
        "the gain. Predicted, not measured."
    )
    parser.add_argument(
        "folder",
        type=Path,
        metavar="FOLDER",
        help="what a run with --moe-llep-record wrote, or with --moe-routing-trace-path",
    )
    parser.add_argument(
        "--machine",
        help=f"of {', '.join(PRESETS)} (from data sheets), or a file that calibrate wrote; "
        f"default: {_DEFAULT_MACHINE}, an assumption",
    )
    parser.add_argument(
        "--model",
        help=f"of {', '.join(MODELS)}, or a file as in configs/: the rest of the model, so that "
        "gains are those of a step; the BASE of what is written",
    )
    parser.add_argument(
        "--ep", type=int, help="ranks that share tokens; a recording says so, a trace does not"
    )
    parser.add_argument(
        "--ranks-per-node",
        type=int,
        help="consecutive ranks that share a node; default: as recorded, else all",
    )
    parser.add_argument(
        "--max-foreign", type=int, metavar="N", help="most experts that a rank may borrow"
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=32,
        metavar="N",
        help="micro-batches that are replayed, evenly chosen; default: %(default)s",
    )
    parser.add_argument(
        "--margin",
        type=float,
        default=MARGIN,
        help="part of a step that must be gained, as predictions are off; default: %(default)s",
    )
    parser.add_argument(
        "--output", type=Path, metavar="YAML", help="flags, for tools/launch.py and check"
    )


def run(args: argparse.Namespace) -> int:
    """Tune, print, and write the file if asked to.

    Raises:
        ValueError: a flag is wrong, or the folder cannot be read.
    """
    if not 0 <= args.margin < 1:
        raise ValueError(f"--margin {args.margin}: it is a part of a step, give 0 up to below 1")
    machine = args.machine or _DEFAULT_MACHINE
    cost_model = get_cost_model(machine)
    model = get_model(args.model) if args.model else None
    sample = read_sample(
        args.folder,
        args.steps,
        num_ranks=args.ep,
        num_experts=model.layer.num_experts if model else None,
    )
    base = keep_settings(sample.settings)
    cost = LayerCost(model=cost_model, shape=find_shape(sample, base, model))
    nodes = find_nodes(args.ranks_per_node, sample.num_ranks, sample.ranks_per_node)
    mean_load = sum(int(each.sum()) for each in sample.counts) / len(sample.counts)
    grid = make_grid(
        base,
        experts_per_rank=sample.num_experts // sample.num_ranks,
        mean_load=mean_load / sample.num_ranks,
        machine=machine,
        nodes=list_nodes(nodes, sample.ranks_per_host),
        max_foreign=args.max_foreign,
    )
    others = predict_others(sample, model, cost_model)
    lines = _describe(args, sample, nodes, len(grid), cost_model.machine, others is not None)
    print("\n".join(lines), end="\n\n", flush=True)
    found = None
    if sample.ranks_per_host is not None:
        found = make_topology(sample.ranks_per_host, sample.num_ranks)
    replayer = Replayer(sample.counts, cost, nodes.topology, base.token_assignment, found)
    groups = len({drop_threshold(setting) for setting in grid})
    scored = search(replayer, grid, start_progress(groups, "replaying"))
    choice = choose(scored, replayer, sample, cost, others=others, margin=args.margin)
    from megatron_llep.offline.tune.report import format_choice, write_flags

    print(format_choice(choice))
    if args.output:
        base_file = Path(args.model) if args.model and args.model not in MODELS else None
        write_flags(args.output, choice, lines, base_file)
        print(f"\nwritten: {args.output}" + ("" if base_file else "; name your model as its BASE"))
    return 0


def _describe(
    args: argparse.Namespace,
    sample: Sample,
    nodes: Nodes,
    settings: int,
    machine: str,
    whole: bool,
) -> list[str]:
    """What was replayed, where, and what the gain is of."""
    lines = [
        f"{args.folder}: {sample.num_ranks} ranks, {sample.num_experts} experts, {sample.top_k} a "
        f"token; {sample.num_batches} of {sample.batches_of_run} micro-batches, evenly chosen, "
        f"{len(sample.counts)} layers",
        f"machine: {machine}",
    ]
    if args.machine is None:
        lines[-1] += "; an assumption, give --machine"
    lines.append(f"nodes: {nodes}")
    what = "the whole step, forward and backward" if whole else "MoE layers only, without the rest"
    lines.append(f"predicted, not measured: {what}; {settings} settings")
    return lines
