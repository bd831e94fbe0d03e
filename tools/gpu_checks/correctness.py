"""Section correctness: real Megatron with LLEP against plain Megatron, in several processes."""

import dataclasses

import torch

from gpu_checks.correctness_ranks import Comparison, Planner, RankJob, run_ranks
from gpu_checks.environment import is_installed
from gpu_checks.section import Section

WORKLOADS = ("hot-95-1", "hot-rank", "lognormal-2")
PLANNERS: tuple[Planner, ...] = ("tolerant", "exact", "lla")
MOST_LOSS, MOST_GRADIENT = 1e-5, 1e-4
"""fp32: relative differences from plain, as in the tests on CPUs."""
MOST_LOSS_BF16, MOST_CONTROL = 5e-3, 2.0
"""bf16: the loss, and how much further from fp32 than plain bf16 a gradient may be."""


def check_correctness(*, ep_sizes: tuple[int, ...], device: str, quick: bool) -> Section:
    """Compare at every size of the expert-parallel group."""
    if not is_installed("megatron.core"):
        reason = "megatron-core is not installed"
        return Section(name="correctness", state="skipped", reason=reason)
    short: list[str] = []
    data: dict[str, object] = {}
    for ep in ep_sizes:
        gpus = torch.cuda.device_count() if device == "cuda" else 0
        job = RankJob(
            ep=ep,
            backend="nccl" if gpus >= ep else "gloo",
            quick=quick,
            workloads=WORKLOADS[:1] if quick else WORKLOADS,
            planners=PLANNERS[:1] if quick else PLANNERS,
            transformer_engine=gpus > 0 and is_installed("transformer_engine"),
        )
        print(f"EP={ep}: {describe_world(ep, gpus)}", flush=True)
        ranks = run_ranks(job)
        worst = [merge(of_ranks) for of_ranks in zip(*ranks, strict=True)]
        for each in worst:
            shortfall = judge(each)
            print(f"  {format_comparison(each)}{'' if not shortfall else '  <- ' + shortfall}")
            if shortfall:
                short.append(f"EP={ep}, {each.what}: {shortfall}")
        data[f"ep{ep}"] = {
            "world": describe_world(ep, gpus),
            "comparisons": [dataclasses.asdict(each) for each in worst],
        }
    return Section(
        name="correctness",
        state="FAILED" if short else "passed",
        reason="; ".join(short),
        data=data,
    )


def describe_world(ep: int, gpus: int) -> str:
    """Which processes run where."""
    if not gpus:
        return f"{ep} processes on the CPU, gloo"
    if gpus >= ep:
        return f"{ep} processes on {ep} GPUs, NCCL"
    return f"{ep} processes share {gpus} GPU{'s' * (gpus > 1)}, gloo through host memory"


def merge(ranks: tuple[Comparison, ...]) -> Comparison:
    """The worst rank's numbers of one comparison."""
    worst = max(ranks, key=lambda each: each.gradient_difference)
    ratios = [each.control_ratio for each in ranks if each.control_ratio is not None]
    return dataclasses.replace(
        worst,
        loss_difference=max(each.loss_difference for each in ranks),
        control_ratio=max(ratios) if ratios else None,
    )


def judge(each: Comparison) -> str:
    """What falls short, or nothing."""
    low_precision = "bfloat16" in each.what
    if each.lent == 0:
        return "nothing was lent, so nothing was compared"
    if not each.loss_difference <= (MOST_LOSS_BF16 if low_precision else MOST_LOSS):
        return "losses differ"
    if low_precision:
        if each.control_ratio is not None and not each.control_ratio <= MOST_CONTROL:
            return f"gradients are further from fp32 than {MOST_CONTROL} times plain's"
    elif not each.gradient_difference <= MOST_GRADIENT:
        return f"the gradient of {each.worst_parameter} differs"
    return ""


def format_comparison(each: Comparison) -> str:
    """One line."""
    control = ""
    if each.control_ratio is not None:
        control = f", distance from fp32 {each.control_ratio:.2f} of plain's"
    return (
        f"{each.what}: {each.lent} lent, losses {each.loss_difference:.1e}, gradients "
        f"{each.gradient_difference:.1e} apart{control}"
    )
