"""Section kernels: the tests that need a GPU, as pytest runs them."""

import re
import subprocess
import sys
from pathlib import Path

from gpu_checks.environment import is_installed
from gpu_checks.section import Section

_MARK = "mark.gpu"
_NO_TESTS = 5
"""pytest's exit code when nothing was selected."""


def check_kernels(root: Path, *, device: str, limit_seconds: float) -> Section:
    """Run `pytest -m gpu` and report its closing line."""
    name = "kernels"
    if device != "cuda":
        return Section(name=name, state="skipped", reason="these tests need a GPU")
    for module in ("pytest", "megatron.core"):
        if not is_installed(module):
            reason = f"{module} is not installed, and the tests import it"
            return Section(name=name, state="skipped", reason=reason)
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
        reason = f"pytest -m gpu took more than {limit_seconds:.0f} s"
        return Section(name=name, state="FAILED", reason=reason)
    return judge_pytest(done.returncode, done.stdout)


def find_gpu_tests(root: Path) -> list[str]:
    """The files with tests that need a GPU; others may import what this machine does not have."""
    files = (root / "tests").rglob("test_*.py")
    return sorted(str(path) for path in files if _MARK in path.read_text())


def judge_pytest(code: int, output: str) -> Section:
    """The verdict from pytest's exit code and what it printed."""
    lines = output.strip().splitlines()
    closing = lines[-1].strip("= ") if lines else "pytest printed nothing"
    if code == _NO_TESTS:
        return Section(name="kernels", state="skipped", reason=f"no test needs a GPU: {closing}")
    if code == 0 and not re.search(r"\b\d+ passed", closing):
        return Section(name="kernels", state="skipped", reason=f"none of them ran: {closing}")
    if code:
        print("\n".join(lines[-60:]))
    return Section(
        name="kernels",
        state="FAILED" if code else "passed",
        reason=closing,
        data={"pytest": closing},
    )
