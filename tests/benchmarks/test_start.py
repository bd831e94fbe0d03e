"""Every benchmark can be started as a script and as a module."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NAMES = [
    "bench_layer",
    "compare_planners",
    "expert_gemm",
    "host_time",
    "nodes_table",
    "observe_cost",
    "plan_time",
    "view_time",
]
# All in one process, up to their last line; then what they import later, with the device chosen.
START = {
    "module": "runpy.run_module('benchmarks.' + name)",
    "script": "runpy.run_path('benchmarks/' + name + '.py')",
}
CODE = """
import runpy, sys
import megatron_llep
sys.path[:] = [{folder!r}, *(path for path in sys.path[1:] if path != {root!r})]
for name in {names!r}:
    {start}
from megatron_llep.device import use_cpu_if_no_gpu
use_cpu_if_no_gpu()
import benchmarks.layer_case
"""


@pytest.mark.parametrize("kind", START)
def test_all_start(kind):
    folder = str(ROOT if kind == "module" else ROOT / "benchmarks")
    code = CODE.format(folder=folder, root=str(ROOT), names=NAMES, start=START[kind])
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
