"""The host's time between counts and exchange: a short run."""

import json
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
# In a process of its own: its process groups are stand-ins.
SCRIPT = """
import json
from megatron_llep.device import use_cpu_if_no_gpu
use_cpu_if_no_gpu()
from host_time import measure
print(json.dumps(measure((16,), ("megatron", "grouped_mm"), 3)))
"""


def test_a_short_run():
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=BENCHMARKS, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])
    assert [(row["experts"], row["workload"]) for row in rows] == [
        (experts, workload)
        for experts in ("megatron", "grouped_mm")
        for workload in ("balanced", "lognormal-1", "hot-95-1")
    ]
    for row in rows:
        assert row["all_us"] > row["plan_us"] > 0
        assert (row["lent"] > 0) == (row["workload"] != "balanced")
