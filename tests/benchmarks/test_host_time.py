"""The host's time between counts and exchange: a short run of the script."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "host_time.py"
# In a process of its own: its process groups are stand-ins. Imported as a script is.
CODE = f"""
import json, runpy
from megatron_llep.device import use_cpu_if_no_gpu
use_cpu_if_no_gpu()
script = runpy.run_path({str(SCRIPT)!r})
rows = script["measure"]((8,), (32,), 3)
print(script["format_tables"](rows))
print(json.dumps(rows))
"""


def test_a_short_run(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", CODE], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    *printed, last = done.stdout.splitlines()
    rows = json.loads(last)
    assert [(row["experts"], row["workload"]) for row in rows] == [
        (experts, workload)
        for experts in ("SequentialMLP", "grouped_mm")
        for workload in ("nothing lent", "7 lent", "lognormal-1")
    ]
    for row in rows:
        lends = row["workload"] != "nothing lent"
        assert (row["lent"] > 0) == (row["loan_us"] > 0) == (row["lend_us"] > 0) == lends
        assert row["lent"] == 7 or row["workload"] != "7 lent"
        assert row["plan_us"] > 0
        assert row["order_us"] > 0
        assert row["list_us"] > 0
        # Each is a median by itself, so their sum is not exactly the whole.
        assert row["llep_all_us"] > max(row["plan_us"], row["list_us"], row["order_us"])
        assert 0 < row["plain_all_us"] < 1e3 * row["plain_layer_ms"]
        for layer in ("llep", "plain"):
            assert 0 < row[f"{layer}_backward_ms"] < row[f"{layer}_layer_ms"]
    table = [line.split() for line in printed if line.split()[:2] == ["8", "32"]]
    assert len(table) == 2 * len(rows), "spans, then whole layers"
    assert float(table[0][-3]) == pytest.approx(rows[0]["plain_all_us"], abs=0.51)
