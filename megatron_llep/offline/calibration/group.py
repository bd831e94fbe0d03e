"""The processes that measure: new ones on this machine, or those that torchrun started on nodes."""

import os
import socket
from collections import Counter
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_llep.offline.nodes import Nodes, find_nodes
from megatron_llep.planner.topology import find_ranks_per_node

LIMIT = timedelta(minutes=5)
"""For what all ranks do together, so that one that is missing is an error."""


@dataclass(frozen=True, kw_only=True)
class Member:
    """This process, in the group of all."""

    rank: int
    device: torch.device
    """Its own GPU, or the CPU, of which it keeps to one core."""
    nodes: Nodes


def is_launched() -> bool:
    """Whether torchrun, or what sets the same variables, started this process."""
    several = "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1
    return dist.is_torchelastic_launched() or several


def join_new(rank: int, store: Path, world: int) -> Member:
    """Make the group, as one of so many new processes on this machine."""
    device = _take_device(rank, rank)
    _stay_on_this_machine(device)
    dist.init_process_group(
        _choose_backend(device),
        store=dist.FileStore(str(store), world),
        rank=rank,
        world_size=world,
        timeout=LIMIT,
    )
    return Member(rank=rank, device=device, nodes=find_nodes(world, world))


def join_launched(ranks_per_node: int | None) -> Member:
    """Make the group that the launcher's variables describe.

    Args:
        ranks_per_node: None: as the ranks' hostnames tell.

    Raises:
        ValueError: ranks do not meet, have no GPU each, or are not spread evenly over nodes.
    """
    rank = int(os.environ["RANK"])
    local_rank = int(os.environ.get("LOCAL_RANK", rank))
    device = _take_device(rank, local_rank)
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
        _stay_on_this_machine(device)
    try:
        dist.init_process_group(_choose_backend(device), timeout=LIMIT)
    except RuntimeError as error:
        raise ValueError(
            f"the {os.environ['WORLD_SIZE']} ranks did not meet at {os.environ.get('MASTER_ADDR')} "
            f"within {LIMIT.total_seconds():.0f} s: start the same command on every node, by names "
            f"that reach each other ({error})"
        ) from error
    world = dist.get_world_size()
    if ranks_per_node is not None:
        return Member(rank=rank, device=device, nodes=find_nodes(ranks_per_node, world))
    hosts: list[str] = [""] * world
    dist.all_gather_object(hosts, socket.gethostname())
    per_node = find_ranks_per_node(hosts)
    if per_node is None:
        raise ValueError(
            f"ranks are not spread evenly over hosts, one after another ({dict(Counter(hosts))}): "
            "start as many on each, or say with --ranks-per-node how many share a node"
        )
    nodes = Nodes(num_ranks=world, ranks_per_node=per_node, source="as their hostnames tell")
    return Member(rank=rank, device=device, nodes=nodes)


def _choose_backend(device: torch.device) -> str:
    return "nccl" if device.type == "cuda" else "gloo"


def _take_device(rank: int, local_rank: int) -> torch.device:
    """One GPU, or one core, for this rank alone.

    Cores go by the rank in the whole group: on a node ranks follow each other, and two nodes on one
    machine are of use in tests.
    """
    if torch.cuda.is_available():
        gpus = torch.cuda.device_count()
        if local_rank >= gpus:
            raise ValueError(
                f"local rank {local_rank}: each needs a GPU, and here are {gpus}; start no more"
            )
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)
    torch.set_num_threads(1)
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    return torch.device("cpu")


def _stay_on_this_machine(device: torch.device) -> None:
    """What gloo exchanges needs no network."""
    if device.type == "cpu" and os.uname().sysname == "Linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
