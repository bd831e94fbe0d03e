"""`calibrate`: measure this machine and write the cost model that planner auto needs."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_llep.offline.calibration.build import build_cost_model
from megatron_llep.offline.calibration.planning import time_planning
from megatron_llep.offline.nodes import Nodes
from megatron_llep.offline.report.table import format_table
from megatron_llep.planner.cost.link import Link
from megatron_llep.planner.cost.model import CostModel
from megatron_llep.planner.cost.presets import PRESETS, get_cost_model

if TYPE_CHECKING:  # it imports torch, which --help need not wait for
    from megatron_llep.offline.calibration.measure import Measurements, Sizes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    parser.description = (
        "Measure experts, copies and transfers on this machine (in two processes unless told; on "
        "CPUs one core each, over gloo; on GPUs over NCCL), fit the cost model, check it on "
        "measurements it was not fitted to, and save it. Started by torchrun on several nodes, its "
        "processes measure together: inside their nodes, and between them. Takes about a minute, "
        "over a slow link some more; let nothing else run."
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
        "one each (default: 2, or 1 with one GPU); under torchrun --nproc-per-node says it",
    )
    parser.add_argument(
        "--ranks-per-node",
        type=int,
        metavar="N",
        help="under torchrun: consecutive ranks that share a node; default: as their hostnames "
        "tell",
    )
    parser.add_argument(
        "--inter-node-bandwidth",
        type=float,
        metavar="GB/S",
        help="what one rank has to other nodes, each way, where one machine measures; default: as "
        "inside the node",
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
        help="take the links from a data sheet, but for the one between nodes if there are "
        "several; needed with one GPU, which has nobody to talk to",
    )
    parser.add_argument("--quick", action="store_true", help="few sizes: a trial run")


def run(args: argparse.Namespace) -> int:
    """Calibrate; 0 when the model is written.

    Raises:
        ValueError: a flag is wrong, or the timings make no sense.
    """
    found = calibrate(args)
    if found is None:
        return 0
    model, lines = found
    model.save(args.output)
    print("\n".join(lines))
    print(f"\n{describe_model(model)}\n\nwritten to {args.output}")
    return 0


def calibrate(args: argparse.Namespace) -> tuple[CostModel, list[str]] | None:
    """Measure and fit; the model, and what is to be said of it. None where the first rank fits."""
    import torch

    from megatron_llep.offline.calibration.group import is_launched
    from megatron_llep.offline.calibration.measure import (
        CPU_SIZES,
        GPU_SIZES,
        choose_sizes,
        measure,
    )
    from megatron_llep.offline.machine import describe_machine

    _check_flags(args, launched=is_launched())
    links = get_cost_model(args.links) if args.links else None
    gpu = torch.cuda.is_available()
    if links is None and gpu and torch.cuda.device_count() == 1 and not is_launched():
        raise ValueError("--links: one GPU cannot measure transfers; name a preset for them")
    sizes = choose_sizes(
        GPU_SIZES if gpu else CPU_SIZES,
        expert=(args.hidden, args.ffn_hidden) if args.hidden else None,
        quick=args.quick,
    )
    machine, lines = describe_machine(), []
    if is_launched():
        found, nodes = _measure_launched(args, sizes)
        if found is None:
            return None
        if nodes.number > 1:
            machine += f"; {nodes.number} nodes of {nodes.ranks_per_node} ranks"
    else:
        found = measure(sizes, report=_report, ranks=args.ranks)
    if links:
        what = "link inside a node" if found.across else "links"
        machine += f"; {what}: {links.machine}"
    elif found.inside is None:
        lines.append(
            "one rank a node has nobody inside it: that link is taken to be as between nodes; to "
            "measure it, start more on each; to take a data sheet's, give --links"
        )
    inter_node = links.inter_node if links else None
    if args.inter_node_bandwidth is not None:
        inter_node = Link(
            latency_seconds=args.inter_node_latency * 1e-6,
            bytes_per_second=args.inter_node_bandwidth * 1e9,
        )
    model, checks = build_cost_model(
        machine=machine,
        experts=found.experts,
        inside=found.inside,
        across=found.across,
        copy_bytes_per_second=found.copy_bytes_per_second,
        overlap=links.overlap if links and not found.across else found.overlap,
        planning_seconds=time_planning(),
        intra_node=links.intra_node if links else None,
        inter_node=None if found.across else inter_node,
    )
    return model, [*lines, *(f"prediction error, {check}" for check in checks)]


def _measure_launched(
    args: argparse.Namespace, sizes: "Sizes"
) -> tuple["Measurements | None", Nodes]:
    """Measure with all that torchrun started; what was found on the first rank, and the nodes."""
    from megatron_llep.offline.calibration.group import join_launched
    from megatron_llep.offline.calibration.measure import measure_together

    member = join_launched(args.ranks_per_node)
    nodes = member.nodes
    if nodes.number > 1 and args.inter_node_bandwidth is not None:
        raise ValueError(
            f"--inter-node-bandwidth {args.inter_node_bandwidth:g}: between these {nodes.number} "
            "nodes it is measured; leave it out, or measure on one node"
        )
    if nodes.num_ranks == 1 and not args.links:
        raise ValueError(
            "--links: one rank cannot measure transfers; name a preset for them, or start several"
        )
    if member.rank == 0:
        _report(f"experts, copies and transfers on {nodes}")
    found = measure_together(member, sizes)
    return found if member.rank == 0 else None, nodes


def _check_flags(args: argparse.Namespace, *, launched: bool) -> None:
    if args.ranks is not None:
        if launched:
            raise ValueError(
                f"--ranks {args.ranks}: torchrun has started the ranks; leave it out, and give "
                "torchrun --nproc-per-node"
            )
        if args.ranks < 2:
            raise ValueError(f"--ranks {args.ranks}: transfers need two ranks; give 2 or more")
    if args.ranks_per_node is not None and not launched:
        raise ValueError(
            f"--ranks-per-node {args.ranks_per_node}: here is one node; leave it out, or start "
            "the command with torchrun on each"
        )
    if (args.hidden is None) != (args.ffn_hidden is None):
        raise ValueError("--hidden and --ffn-hidden go together: give both or none")


def _report(what: str) -> None:
    print(f"measuring {what} ...", flush=True)


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
