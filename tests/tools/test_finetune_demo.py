"""tools/finetune_demo.py: one short run of the whole, and the comparison on what it leaves."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SFT_STEPS, RL_STEPS = 10, 3


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    out = tmp_path_factory.mktemp("finetune") / "runs"
    command = [sys.executable, ROOT / "tools" / "finetune_demo.py", "--out", out]
    command += ["--sft-steps", str(SFT_STEPS), "--rl-steps", str(RL_STEPS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return out, done.stdout


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_both_stages_agree_and_say_what_they_reached(demo):
    out, printed = demo
    assert printed.count("plain EP and LLEP agree") == 2
    for stage in ("sft", "rl"):
        figures = json.loads((out / f"{stage}.json").read_text())
        assert figures["comparison"]["agree"]
        assert figures["goals"]["imbalance_after"] <= 1.05
        page = (out / f"{stage}.html").read_text()
        assert 'src="data:image/png;base64,' in page
        assert not re.search(r'(src|href)="http', page), "nothing is loaded from elsewhere"
    rows = {row[0]: row[1:] for row in figures["rows"]}
    assert len(figures["goals"]["reward_rise"]) == 2
    decode = rows["imbalance in rollout, decoding (nothing is lent), median"]
    assert decode[0] == decode[1]


@pytest.mark.slow
def test_rewards_are_the_same_both_ways(demo):
    out, _ = demo
    judged = json.loads((out / "rl.json").read_text())["comparison"]["metrics"]["rl/mean_reward"]
    assert judged["steps"] == RL_STEPS
    assert judged["checks"][-1]["value"] <= 1e-6


@pytest.mark.slow
def test_compare_reads_what_it_leaves(demo, tmp_path):
    out, _ = demo
    command = [
        sys.executable,
        ROOT / "finetune" / "compare.py",
        out / "sft/plain",
        out / "sft/llep",
    ]
    command += ["--target", "exact match=0.9", "--out", tmp_path / "compare"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "time to exact match 0.9" in done.stdout
    assert (tmp_path / "compare" / "compare.html").is_file()


@pytest.mark.parametrize("option", ["--sft-steps", "--rl-steps"])
def test_too_few_steps_are_refused(option):
    command = [sys.executable, ROOT / "tools" / "finetune_demo.py", option, "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert f"{option} 1: give 2 or more" in done.stderr
