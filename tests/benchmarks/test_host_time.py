"""The host's time between counts and exchange: a short run of the script."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "host_time.py"
# In a process of its own: its process groups are stand-ins. Imported as a script is.
CODE = f"""
import json, runpy
from megatron_llep.device import use_cpu_if_no_gpu
use_cpu_if_no_gpu()
measure = runpy.run_path({str(SCRIPT)!r})["measure"]
print(json.dumps(measure((16,), ("megatron", "grouped_mm"), 3)))
"""


def test_a_short_run(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", CODE], cwd=tmp_path, capture_output=True, text=True, timeout=120
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
