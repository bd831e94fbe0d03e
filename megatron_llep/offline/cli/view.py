"""`view`: a recording as one page that a browser opens without a network."""

import argparse
import dataclasses
import time
from pathlib import Path

from megatron_llep.offline.methods import METHODS, check_methods
from megatron_llep.offline.nodes import find_nodes
from megatron_llep.planner.cost.presets import PRESETS, get_cost_model

_DEFAULT_MACHINE = "h200"


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
        help=f"for predicted times: of {', '.join(PRESETS)} (from data sheets), or a file that "
        f"calibrate wrote; default: {_DEFAULT_MACHINE}, an assumption",
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
        "--ranks-per-node",
        type=int,
        help="consecutive ranks that share a node; default: as recorded, else all",
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
    from megatron_llep.offline.view.summary import SAID

    started = time.monotonic()
    methods = check_methods(("plain", *args.planners), "--planners")
    if args.max_cells is not None and args.max_cells < 1:
        raise ValueError(f"--max-cells {args.max_cells} must be at least 1")
    cost = get_cost_model(args.machine or _DEFAULT_MACHINE)
    shape = get_model(args.model).layer if args.model else None
    recording = Recording.open(args.folder)
    info = recording.info
    if shape is not None:
        shape = dataclasses.replace(shape, num_experts=info.num_experts, top_k=info.top_k)
    options = Options(
        cost=cost,
        nodes=find_nodes(args.ranks_per_node, info.num_ranks, info.ranks_per_node),
        is_assumed=args.machine is None,
        methods=methods,
        shape=shape,
        shape_from=args.model or "the recording",
        max_cells=args.max_cells,
    )
    view = build_view(recording, options)
    size = write_page(args.output, view)
    seconds = time.monotonic() - started
    print(view["summary"])
    for name, value in view["facts"]:
        if name in SAID:
            print(f"{name.lower()}: {value}")
    print(f"written: {args.output}, {size / 1e6:.1f} MB ({seconds:.0f} s)")
    return 0
