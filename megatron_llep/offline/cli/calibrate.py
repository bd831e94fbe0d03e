"""`calibrate`: measure this machine and write the cost model that planner auto needs."""

import argparse
from pathlib import Path

from megatron_llep.offline.calibration.build import build_cost_model
from megatron_llep.offline.calibration.planning import time_planning
from megatron_llep.offline.report.table import format_table
from megatron_llep.planner.cost.link import Link
from megatron_llep.planner.cost.model import CostModel
from megatron_llep.planner.cost.presets import PRESETS, get_cost_model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    parser.description = (
        "Measure experts, copies and transfers on this machine (in two processes unless told; on "
        "CPUs one core each, over gloo; on GPUs over NCCL), fit the cost model, check it on "
        "measurements it was not fitted to, and save it. Takes less than a minute; let nothing "
        "else run."
    )
    parser.add_argument("--output", type=Path, default=Path("cost_model.json"))
    parser.add_argument(
        "--hidden", type=int, help="hidden size of your model; default: two sizes of experts"
    )
    parser.add_argument("--ffn-hidden", type=int, help="inner size of your experts; with --hidden")
    parser.add_argument(
        "--ranks",
        type=int,
        help="processes that measure together; on CPUs as many as will share the cores, on GPUs "
        "one each (default: 2, or 1 with one GPU)",
    )
    parser.add_argument(
        "--inter-node-bandwidth",
        type=float,
        metavar="GB/S",
        help="what one rank has to other nodes, each way, which one machine cannot measure; "
        "default: as inside the node",
    )
    parser.add_argument(
        "--inter-node-latency",
        type=float,
        metavar="US",
        default=20.0,
        help="with --inter-node-bandwidth; microseconds (default: %(default)s)",
    )
    parser.add_argument(
        "--links",
        metavar="{" + ",".join(PRESETS) + "}",
        help="take the links from a data sheet; needed with one GPU, which has nobody to talk to",
    )
    parser.add_argument("--quick", action="store_true", help="few, small sizes: a trial run")


def run(args: argparse.Namespace) -> int:
    """Calibrate; 0 when the model is written.

    Raises:
        ValueError: a flag is wrong, or the timings make no sense.
    """
    model, lines = calibrate(args)
    model.save(args.output)
    print("\n".join(lines))
    print(f"\n{describe_model(model)}\n\nwritten to {args.output}")
    return 0


def calibrate(args: argparse.Namespace) -> tuple[CostModel, list[str]]:
    """Measure and fit; the model, and what the check says."""
    import torch

    from megatron_llep.offline.calibration.measure import (
        CPU_SIZES,
        GPU_SIZES,
        choose_sizes,
        measure,
    )
    from megatron_llep.offline.machine import describe_machine

    if args.ranks is not None and args.ranks < 2:
        raise ValueError(f"--ranks {args.ranks}: transfers need two ranks; give 2 or more")
    if (args.hidden is None) != (args.ffn_hidden is None):
        raise ValueError("--hidden and --ffn-hidden go together: give both or none")
    links = get_cost_model(args.links) if args.links else None
    if links is None and torch.cuda.is_available() and torch.cuda.device_count() == 1:
        raise ValueError("--links: one GPU cannot measure transfers; name a preset for them")
    inter_node = links.inter_node if links else None
    if args.inter_node_bandwidth is not None:
        inter_node = Link(
            latency_seconds=args.inter_node_latency * 1e-6,
            bytes_per_second=args.inter_node_bandwidth * 1e9,
        )
    sizes = choose_sizes(
        GPU_SIZES if torch.cuda.is_available() else CPU_SIZES,
        expert=(args.hidden, args.ffn_hidden) if args.hidden else None,
        quick=args.quick,
    )
    found = measure(
        sizes,
        report=lambda what: print(f"measuring {what} ...", flush=True),
        ranks=args.ranks,
    )
    machine = describe_machine()
    if links:
        machine += f"; links: {links.machine}"
    model, checks = build_cost_model(
        machine=machine,
        experts=found.experts,
        transfers=found.transfers,
        uneven=found.uneven,
        copy_bytes_per_second=found.copy_bytes_per_second,
        overlap=links.overlap if links else found.overlap,
        planning_seconds=time_planning(),
        intra_node=links.intra_node if links else None,
        inter_node=inter_node,
    )
    return model, [f"prediction error, {check}" for check in checks]


def describe_model(model: CostModel) -> str:
    """The numbers of a cost model, one a line, in units that people use."""
    rows = [
        ("machine", model.machine),
        ("large expert, forward", f"{model.flops_per_second / 1e9:.4g} GFLOP/s"),
        ("half that rate at", f"{model.half_rate_tokens:.3g} tokens"),
        ("overhead of a slot", f"{model.gemm_overhead_seconds * 1e6:.3g} us"),
        ("backward / forward", f"{model.backward_factor:.2f}"),
        ("copies", f"{model.copy_bytes_per_second / 1e9:.3g} GB/s"),
        ("inside the node", _describe_link(model.intra_node)),
        ("between nodes", _describe_link(model.inter_node)),
        ("overlap", f"{model.overlap:.0%} of what two exchanges at once can save"),
        ("planning", f"{model.planning_seconds * 1e6:.0f} us a layer"),
    ]
    return format_table(rows, "<<")


def _describe_link(link: Link) -> str:
    words = f"{link.bytes_per_second / 1e9:.3g} GB/s, latency {link.latency_seconds * 1e6:.3g} us"
    if link.burst_bytes:
        words += (
            f"; the first {link.burst_bytes / 2**20:.3g} MiB at {link.burst_cost:.2g} of the time"
        )
    if link.opposite_cost:
        words += f"; the other way costs {link.opposite_cost:.0%} more"
    return words
