"""One rank's comparisons: LLEP against plain expert parallelism, on the same weights and tokens."""

from dataclasses import replace

import torch
from megatron.core.transformer.moe.experts import TEGroupedMLP

from gpu_checks.correctness_ranks import Comparison, RankJob
from gpu_checks.lending_run import Kind, ModelSize, Outcome, run_model
from megatron_llep.config import LLEPConfig
from megatron_llep.experts import KINDS as LENDABLE

LENDS_WHEREVER_IT_CAN = LLEPConfig(imbalance_threshold=1.0, min_tokens_per_gemm=1)
_QUICK = ModelSize(hidden=32, ffn_hidden=64, num_experts=8, sequence_length=16, layers=1)


def compare_all(job: RankJob, device: torch.device) -> list[Comparison]:
    """Every workload, dtype and planner of the job; all ranks run the same."""
    size = _QUICK if job.quick else ModelSize()
    found = []
    for workload in job.workloads:
        for kind in list_kinds(job):
            plain = run_model(size, kind, workload, None, device)
            exact = None
            if kind.dtype != torch.float32:
                in_fp32 = replace(kind, dtype=torch.float32)
                exact = run_model(size, in_fp32, workload, None, device)
            for planner in job.planners:
                llep = replace(
                    LENDS_WHEREVER_IT_CAN,
                    planner=planner,
                    expert_gemm="grouped_mm" if kind.grouped_mm else "megatron",
                )
                lending = run_model(size, kind, workload, llep, device)
                what = f"{_describe(kind)}, {workload}, {planner}"
                found.append(compare(what, lending, plain, exact))
    return found


def list_kinds(job: RankJob) -> list[Kind]:
    """fp32 and bf16 on Megatron's local layers; bf16 in grouped GEMMs, of torch's and TE's."""
    kinds = [Kind(dtype=torch.float32), Kind(dtype=torch.bfloat16)]
    if hasattr(torch.nn.functional, "grouped_mm"):
        kinds.append(Kind(dtype=torch.bfloat16, grouped_mm=True))
    if job.transformer_engine and any(kind.module_type is TEGroupedMLP for kind in LENDABLE):
        kinds.append(Kind(dtype=torch.bfloat16, transformer_engine=True))
    return kinds


def compare(what: str, lending: Outcome, plain: Outcome, exact: Outcome | None) -> Comparison:
    """LLEP against plain, and in low precision both against `exact`, plain in fp32."""
    differences = {
        name: _relative(lending.gradients[name] - gradient, gradient)
        for name, gradient in plain.gradients.items()
    }
    worst = max(differences, key=lambda name: differences[name])
    ratio = None
    if exact is not None:
        ratio = max(
            _ratio(lending.gradients[name], plain.gradients[name], gradient)
            for name, gradient in exact.gradients.items()
        )
    return Comparison(
        what=what,
        lent=lending.lent,
        loss_difference=max(
            abs(mine - theirs) / abs(theirs)
            for mine, theirs in zip(lending.losses, plain.losses, strict=True)
        ),
        gradient_difference=differences[worst],
        worst_parameter=worst,
        control_ratio=ratio,
    )


def _relative(difference: torch.Tensor, reference: torch.Tensor) -> float:
    """Largest difference / largest reference; the difference itself where that is 0. NaN is inf."""
    largest, scale = difference.abs().max().item(), reference.abs().max().item()
    relative = largest / scale if scale else largest
    return relative if relative == relative else float("inf")


def _ratio(lending: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor) -> float:
    """Distance of LLEP from exact / distance of plain from exact; both 0 where nothing flows."""
    scale = exact.norm().item()
    control = (plain - exact).norm().item()
    distance = (lending - exact).norm().item()
    # Below a thousandth of the gradient, what rounding leaves is chance.
    return distance / max(control, 1e-3 * scale) if scale else float(distance > 0)


def _describe(kind: Kind) -> str:
    layers = "Transformer Engine" if kind.transformer_engine else "local layers"
    if kind.grouped_mm:
        layers += " with grouped_mm"
    return f"{layers}, {str(kind.dtype).removeprefix('torch.')}"
