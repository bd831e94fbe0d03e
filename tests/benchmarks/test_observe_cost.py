"""What observing costs: the figures of known times, and a short run of the script."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from benchmarks.observe_cost import summarise  # noqa: E402
from benchmarks.observe_ranks import OBSERVED, PLAIN, Found  # noqa: E402


def test_medians_and_shares():
    steps = {
        PLAIN: [(1.0, 0.5), (9.0, 0.5), (1.0, 0.5)],
        OBSERVED: [(1.1, 0.6), (1.1, 0.5), (1.8, 0.4)],
    }
    own = [(0.01, 0.001), (0.02, 0.001), (0.05, 0.004)]
    (row,) = summarise([Found(steps=steps, own=own)])
    assert row == {
        "rank": 0,
        "steps": 3,
        "wall_plain_ms": 1000,
        "wall_observed_ms": 1100,
        "wall_ratio": 1.1,
        "wall_own_ms": 20,
        "wall_own_share": 0.02,
        "cpu_plain_ms": 500,
        "cpu_observed_ms": 500,
        "cpu_ratio": 1,
        "cpu_own_ms": 1,
        "cpu_own_share": 0.004,
    }


@pytest.mark.slow
def test_a_short_run(tmp_path):
    output = tmp_path / "cost.json"
    script = ROOT / "benchmarks" / "observe_cost.py"
    done = subprocess.run(
        [sys.executable, str(script), "--rounds", "1", "--steps", "1", "--output", str(output)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    for row in json.loads(output.read_text())["rows"]:
        assert row["steps"] == 2
        assert 0 < row["cpu_own_ms"] < row["cpu_observed_ms"]
