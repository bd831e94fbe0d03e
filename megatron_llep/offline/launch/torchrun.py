"""How many processes a parallel layout needs, and the torchrun command that starts them."""

import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from megatron_llep.offline.launch.flags import format_flags, read_value

MAX_PROCESSES_WITHOUT_GPU = 16
"""Most processes started unasked where no GPU is; --nproc asks for more."""


def layout_world_size(flags: Mapping[str, object]) -> int:
    """Smallest number of processes that the parallel layout in flags fills.

    Dense layers need a multiple of TP * CP * PP processes, expert layers of ETP * EP * PP.

    Raises:
        ValueError: a size is no positive integer.
    """
    tensor = _read_size(flags, "--tensor-model-parallel-size", 1)
    context = _read_size(flags, "--context-parallel-size", 1)
    pipeline = _read_size(flags, "--pipeline-model-parallel-size", 1)
    expert = _read_size(flags, "--expert-model-parallel-size", 1)
    expert_tensor = _read_size(flags, "--expert-tensor-parallel-size", tensor)
    return pipeline * math.lcm(tensor * context, expert_tensor * expert)


def _read_size(flags: Mapping[str, object], flag: str, default: int) -> int:
    value = read_value(flags, flag, default)
    if not str(value).isdigit() or int(str(value)) < 1:
        raise ValueError(f"{flag} {value}: give a number of ranks, 1 or more")
    return int(str(value))


def choose_nproc(flags: Mapping[str, object], nnodes: int, gpu_count: int) -> int:
    """Processes to start on this node when --nproc does not say.

    Raises:
        ValueError: the layout does not spread evenly over the nodes or is too large for them.
    """
    world = layout_world_size(flags)
    nproc, rest = divmod(world, nnodes)
    if rest:
        raise ValueError(
            f"--nnodes {nnodes}: the layout's {world} processes do not spread evenly; give --nproc"
        )
    limit = gpu_count or MAX_PROCESSES_WITHOUT_GPU
    if nproc > limit:
        what = f"{gpu_count} GPUs" if gpu_count else "no GPU"
        raise ValueError(
            f"the layout needs {world} processes, {nproc} on each of {nnodes} node(s), and this "
            f"one has {what}: use more nodes (--nnodes), a smaller layout "
            "(--set --expert-model-parallel-size=...), or give --nproc"
        )
    return nproc


def build_command(
    script: Path,
    flags: Mapping[str, object],
    nproc: int,
    nnodes: int = 1,
    node_rank: int | None = None,
    rdzv_endpoint: str | None = None,
) -> list[str]:
    """Assemble the torchrun command of this node.

    Raises:
        ValueError: several nodes without --node-rank and --rdzv-endpoint, or a rank out of range.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(nproc)]
    if nnodes == 1:
        command += ["--standalone", "--nnodes", "1"]
    else:
        if node_rank is None or rdzv_endpoint is None:
            raise ValueError(
                f"--nnodes {nnodes} needs --node-rank (0 to {nnodes - 1}, different on each node) "
                "and --rdzv-endpoint HOST:PORT (of node 0, the same on all)"
            )
        if not 0 <= node_rank < nnodes:
            raise ValueError(f"--node-rank {node_rank}: give 0 to {nnodes - 1}")
        command += ["--nnodes", str(nnodes), "--node-rank", str(node_rank)]
        command += ["--rdzv-backend", "static", "--rdzv-endpoint", rdzv_endpoint]
    return [*command, str(script), *format_flags(flags)]


def choose_environment(flags: Mapping[str, object], gpu_count: int) -> dict[str, str]:
    """Environment variables the run needs and the caller has not set.

    One thread a process where no GPU is; the single CUDA queue that Megatron asks of tensor and
    context parallelism on GPUs before Blackwell.
    """
    wanted = {}
    if gpu_count == 0:
        wanted["OMP_NUM_THREADS"] = "1"
    elif (
        _read_size(flags, "--tensor-model-parallel-size", 1) > 1
        or _read_size(flags, "--context-parallel-size", 1) > 1
    ):
        wanted["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    return {name: value for name, value in wanted.items() if name not in os.environ}


def count_gpus() -> int:
    """Count the GPUs that PyTorch sees on this node."""
    import torch  # here, so that --help and errors in the configuration stay fast

    return torch.cuda.device_count() if torch.cuda.is_available() else 0
