"""Section correctness: real Megatron with LLEP against plain Megatron, in several processes."""

from collections.abc import Sequence
from dataclasses import asdict

import torch

from gpu_checks.comparison import find_shortfall, merge
from gpu_checks.correctness_ranks import LIMIT_SECONDS, Planner, RankJob, be_a_rank
from gpu_checks.environment import is_installed
from gpu_checks.section import Section, judge, require
from megatron_llep.offline.ranks import run_ranks

WORKLOADS = ("hot-95-1", "hot-rank", "lognormal-2")
PLANNERS: tuple[Planner, ...] = ("tolerant", "exact", "lla")


def check_correctness(device: str, ep_sizes: Sequence[int], *, quick: bool) -> Section:
    """Compare at every size of the expert-parallel group."""
    require("megatron.core")
    gpus = torch.cuda.device_count() if device == "cuda" else 0
    short: list[str] = []
    data: dict[str, object] = {}
    for ep in ep_sizes:
        job = RankJob(
            ep=ep,
            backend="nccl" if gpus >= ep else "gloo",
            quick=quick,
            workloads=WORKLOADS[:1] if quick else WORKLOADS,
            planners=PLANNERS[:1] if quick else PLANNERS,
            transformer_engine=gpus > 0 and is_installed("transformer_engine"),
        )
        world = describe_world(ep, gpus)
        print(f"EP={ep}: {world}", flush=True)
        ranks = run_ranks(be_a_rank, ep, job, limit_seconds=LIMIT_SECONDS)
        worst = [merge(of_ranks) for of_ranks in zip(*ranks, strict=True)]
        for each in worst:
            shortfall = find_shortfall(each)
            print(f"  {each}{shortfall and '  <- ' + shortfall}")
            if shortfall:
                short.append(f"EP={ep}, {each.what}: {shortfall}")
        data[f"ep{ep}"] = {"world": world, "comparisons": [asdict(each) for each in worst]}
    return judge("correctness", short, data)


def describe_world(ep: int, gpus: int) -> str:
    """Which processes run where."""
    if not gpus:
        return f"{ep} processes on the CPU, gloo"
    if gpus >= ep:
        return f"{ep} processes on {ep} GPUs, NCCL"
    return f"{ep} processes share {gpus} GPU{'s' * (gpus > 1)}, gloo through host memory"
