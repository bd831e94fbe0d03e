"""Cost models from data sheets, for machines that are not at hand. None of them was measured.

Sources: NVIDIA's data sheets of H100 SXM and H200 SXM (dense bf16 989 TFLOP/s; NVLink 900 GB/s both
ways together; HBM 3.35 and 4.8 TB/s) and of ConnectX-7 (400 Gbit/s a GPU). Assumptions: GEMMs reach
600 TFLOP/s; half the rate is reached where computing takes as long as reading the weights;
latencies of 10 and 20 microseconds, a kernel's start of 10, planning of 0.3 ms; exchanges that run
at once use both directions of a link in full.
"""

from megatron_llep.planner.cost.link import Link
from megatron_llep.planner.cost.model import CostModel

_TFLOPS = 1e12
_GB = 1e9
_MICROSECONDS = 1e-6


def _make_hopper(name: str, hbm_bytes_per_second: float) -> CostModel:
    flops_per_second = 600 * _TFLOPS
    return CostModel(
        machine=f"{name}, NVLink, InfiniBand NDR; from data sheets, not measured",
        flops_per_second=flops_per_second,
        half_rate_tokens=flops_per_second / hbm_bytes_per_second,  # 2 FLOPs and 2 bytes a weight
        gemm_overhead_seconds=10 * _MICROSECONDS,
        backward_factor=2.0,
        copy_bytes_per_second=hbm_bytes_per_second / 2,  # each byte is read and written
        intra_node=Link(latency_seconds=10 * _MICROSECONDS, bytes_per_second=450 * _GB),
        inter_node=Link(latency_seconds=20 * _MICROSECONDS, bytes_per_second=50 * _GB),
        overlap=1.0,
        planning_seconds=300 * _MICROSECONDS,
    )


PRESETS = {
    "h100": _make_hopper("H100 SXM", 3350 * _GB),
    "h200": _make_hopper("H200 SXM", 4800 * _GB),
}


def get_cost_model(name_or_path: str) -> CostModel:
    """A preset by its name, or a cost model from its file.

    Raises:
        ValueError: neither; names the presets and the command that writes a file.
    """
    if name_or_path in PRESETS:
        return PRESETS[name_or_path]
    try:
        return CostModel.load(name_or_path)
    except ValueError as error:
        raise ValueError(f"{error}, or give a preset: {', '.join(PRESETS)}") from error
