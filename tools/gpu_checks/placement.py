"""Section placement: the Triton kernels against torch's version, and their times."""

import importlib.util

from gpu_checks.section import Section

_MOST_SUM_ERROR = 2**-8
"""Of bf16 sums, relative to the largest: one rounding."""


def check_placement(*, device: str) -> Section:
    """Compare the kernels that order tokens with torch's operators, and time both."""
    name = "placement"
    if device != "cuda":
        return Section(name=name, state="skipped", reason="the kernels need a GPU")
    if importlib.util.find_spec("triton") is None:
        return Section(name=name, state="skipped", reason="triton is not installed")
    from megatron_llep.placement.check import check_placement_kernel

    return judge_placement(check_placement_kernel(device))


def judge_placement(found: dict) -> Section:
    """The verdict from what `check_placement_kernel` returns."""
    for step, milliseconds in found["milliseconds"].items():
        print(f"  {step:22} {milliseconds:8.3f} ms", flush=True)
    right = found["equal"] and found["worst_sum_error"] <= _MOST_SUM_ERROR
    same = "the same indices" if found["equal"] else "OTHER INDICES"
    return Section(
        name="placement",
        state="passed" if right else "FAILED",
        reason=f"{found['cases']} cases: {same} as torch, sums off by "
        f"{found['worst_sum_error']:.1e} (allowed {_MOST_SUM_ERROR:.1e})",
        data=found,
    )
