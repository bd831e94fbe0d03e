"""Sections placement and kernels: what needs a GPU by itself, and the tests that do."""

import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gpu_checks.section import Section, SkippedError, State, judge, require

_MARK = "mark.gpu"
_NO_TESTS = 5
"""pytest's exit code when nothing was selected."""
_MOST_SUM_ERROR = 2**-8
"""Of bf16 sums, relative to the largest: one rounding."""


def check_placement(device: str) -> Section:
    """Compare the kernels that order tokens with torch's operators, and time both."""
    if device != "cuda":
        raise SkippedError("the kernels need a GPU")
    require("triton")
    from megatron_llep.placement.check import check_placement_kernel

    return judge_placement(check_placement_kernel(device))


def judge_placement(found: Mapping[str, Any]) -> Section:
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


def check_kernels(device: str, root: Path, limit_seconds: float = 600) -> Section:
    """Run `pytest -m gpu` and report its closing line."""
    if device != "cuda":
        raise SkippedError("these tests need a GPU")
    require("pytest", "megatron.core")
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", *find_gpu_tests(root)]
    try:
        done = subprocess.run(
            command,
            cwd=root,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=limit_seconds,
        )
    except subprocess.TimeoutExpired:
        return judge("kernels", [f"pytest -m gpu took more than {limit_seconds:.0f} s"], {})
    return judge_pytest(done.returncode, done.stdout)


def find_gpu_tests(root: Path) -> list[str]:
    """The files with tests that need a GPU; others may import what this machine does not have."""
    files = (root / "tests").rglob("test_*.py")
    return sorted(str(path) for path in files if _MARK in path.read_text())


def judge_pytest(code: int, output: str) -> Section:
    """The verdict from pytest's exit code and what it printed."""
    lines = output.strip().splitlines()
    closing = lines[-1].strip("= ") if lines else "pytest printed nothing"
    state: State = "FAILED" if code else "passed"
    if code == _NO_TESTS or (code == 0 and not re.search(r"\b\d+ passed", closing)):
        state, closing = "skipped", f"no test ran: {closing}"
    elif code:
        print("\n".join(lines[-60:]))
    return Section(name="kernels", state=state, reason=closing, data={"pytest": closing})
