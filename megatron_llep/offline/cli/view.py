"""`view`: a recording as one page that a browser opens without a network."""

import argparse
import dataclasses
import time
from pathlib import Path

from megatron_llep.offline.cli.routing import make_topology
from megatron_llep.offline.methods import METHODS, check_methods
from megatron_llep.planner.cost.presets import PRESETS, get_cost_model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    parser.add_argument(
        "folder", type=Path, metavar="FOLDER", help="what a run with --moe-llep-record wrote"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("view.html"),
        metavar="FILE",
        help="the page; default: %(default)s",
    )
    parser.add_argument(
        "--machine",
        default="h200",
        help=f"for predicted times: of {', '.join(PRESETS)} (from data sheets), or a file that "
        "calibrate wrote; default: %(default)s",
    )
    parser.add_argument(
        "--model",
        help="sizes of the MoE layers, instead of the recording's: a model of simulate, or a file "
        "as in configs/",
    )
    parser.add_argument(
        "--planners",
        nargs="+",
        default=list(METHODS),
        metavar="PLANNER",
        help=f"of {', '.join(METHODS)}; default: all",
    )
    parser.add_argument(
        "--ranks-per-node", type=int, help="consecutive ranks that share a node; default: all"
    )
    parser.add_argument(
        "--max-cells",
        type=int,
        metavar="N",
        help="most cells (layer x column of steps), of which each keeps a micro-batch; default: "
        "10000, fewer for more than 8 ranks, and in any case 120 columns at most",
    )


def run(args: argparse.Namespace) -> int:
    """Write the page, and say what it says first."""
    try:
        from megatron_llep.offline.recording import Recording
    except ImportError as error:
        raise ImportError("recordings need pyarrow: pip install 'megatron-llep[record]'") from error
    from megatron_llep.offline.simulator.models import get_model
    from megatron_llep.offline.view.build import Options, build_view
    from megatron_llep.offline.view.page import write_page

    started = time.monotonic()
    methods = check_methods(("plain", *args.planners), "--planners")
    if args.max_cells is not None and args.max_cells < 1:
        raise ValueError(f"--max-cells {args.max_cells} must be at least 1")
    cost = get_cost_model(args.machine)
    shape = get_model(args.model).layer if args.model else None
    recording = Recording.open(args.folder)
    P, per_node = recording.info.num_ranks, args.ranks_per_node
    if shape is not None:
        info = recording.info
        shape = dataclasses.replace(shape, num_experts=info.num_experts, top_k=info.top_k)
    if per_node is not None and (per_node < 1 or P % min(per_node, P)):
        raise ValueError(
            f"--ranks-per-node {per_node} does not divide the {P} ranks that share tokens: give "
            "how many of them are on each node, or leave it out"
        )
    options = Options(
        cost=cost,
        topology=make_topology(per_node, P),
        methods=methods,
        shape=shape,
        shape_from=args.model or "the recording",
        max_cells=args.max_cells,
    )
    view = build_view(recording, options)
    size = write_page(args.output, view)
    seconds = time.monotonic() - started
    print(view["summary"])
    print(f"written: {args.output}, {size / 1e6:.1f} MB ({seconds:.0f} s)")
    return 0
