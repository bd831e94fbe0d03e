"""tools/demo.py: layouts, commands, figures, the verdict, and one short run of the whole."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import demo  # noqa: E402

from megatron_llep.offline.compare.comparison import compare_runs  # noqa: E402
from megatron_llep.offline.compare.rows import timed_steps  # noqa: E402
from megatron_llep.offline.compare.run_log import Curve, RunLog  # noqa: E402
from megatron_llep.offline.demo import driver  # noqa: E402
from megatron_llep.offline.demo.driver import Trained, compare_logs  # noqa: E402
from megatron_llep.offline.demo.pretraining import (  # noqa: E402
    METRICS,
    Layout,
    Phase,
    check_layout,
    plan_phases,
    plan_runs,
)
from megatron_llep.offline.demo.pretraining_report import summarise  # noqa: E402
from megatron_llep.offline.launch.device import Device  # noqa: E402
from megatron_llep.offline.launch.memory import MemoryWatch  # noqa: E402

PHASES = plan_phases(3, 4)
MIB = 2**20


def make_log(name, llep=False, **changes):
    """Seven steps in two phases (3 + 4), two layers; easy numbers."""
    before = np.array([1.1, 1.2, 1.3, 1.8, 1.6, 1.4, 1.2])
    metrics = {"lm loss": np.linspace(6, 3, 7), "iteration-time": np.array([9, 9, 9, 9, 3, 2, 1])}
    if llep:
        metrics |= {
            "moe/llep/overload_factor_before": before,
            "moe/llep/overload_factor_after": np.full(7, 1.05),
            "moe/llep/max_tokens_before": before * 1000,
            "moe/llep/max_tokens_after": np.full(7, 1000.0),
            "moe/llep/lent_experts": np.array([9, 9, 9, 1, 2, 3, 2.0]),
            "moe/llep/lent_mib": np.array([8, 8, 8, 2, 4, 6, 4.0]),
            "moe/llep/fallback_rate": np.full(7, 0.5),
            "moe/llep/plan_ms": np.full(7, 2.0),
        }
        for layer in range(2):
            metrics[f"moe/llep/overload_factor_before_layer_{layer}"] = before
            metrics[f"moe/llep/overload_factor_after_layer_{layer}"] = np.full(7, 1.05)
    metrics |= changes
    steps = np.arange(1, 8)
    curves = {tag: Curve(steps, np.asarray(v, float), steps * 1.0) for tag, v in metrics.items()}
    return RunLog(name, name, curves)


def make_watch(peak):
    """A phase whose worst rank reached `peak` MiB above its libraries, half of it by the steps."""
    peak = peak * MIB
    return MemoryWatch(0, libraries={0: 0, 1: 0}, start={0: peak // 2, 1: 0}, peak={0: peak, 1: 1})


# Layout and device


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (Layout(ep=1), "--ep 1: .* nothing to balance"),
        (Layout(ep=3), "--ep 3: .*--num-experts 8"),
        (Layout(pp=3), "--pp 3: .*--num-layers"),
        (Layout(tp=3), "--tp 3: .*--num-attention-heads"),
        (Layout(etp=5), "--etp 5: .*--moe-ffn-hidden-size"),
        (Layout(tp=0), "--tp 0: .*1 or more"),
    ],
)
def test_a_bad_layout_is_refused(layout, message):
    with pytest.raises(ValueError, match=message):
        check_layout(layout, {})


@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2, pp=2), Layout(ep=4, etp=2, tp=2)])
def test_a_good_layout_is_accepted(layout):
    check_layout(layout, {})


def test_an_override_counts_in_the_layout_check():
    check_layout(Layout(ep=3), {"--num-experts": 6})


def test_a_bad_layout_ends_the_script_before_it_writes(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        demo.main(["--ep", "3", "--out", str(tmp_path / "out")])
    assert stopped.value.code == 2
    assert "--ep 3" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# Commands


def plan_commands(tmp_path, layout=None):
    layout = layout or Layout()
    runs = plan_runs(PHASES, layout, {}, tmp_path)
    return {(run.kind, run.first_step): run.command for run in runs}


def value_of(command, flag):
    return command[command.index(flag) + 1]


def test_both_kinds_differ_only_in_llep_and_in_their_folders(tmp_path):
    commands = plan_commands(tmp_path)
    for first_step in (1, 4):
        plain, llep = commands["plain", first_step], commands["llep", first_step]
        assert plain[3] == "--no-llep"
        rest = [word.replace("plain", "llep") for word in plain if word != "--no-llep"]
        assert rest == llep


def test_the_second_phase_continues_the_first(tmp_path):
    commands = plan_commands(tmp_path)
    for kind in ("plain", "llep"):
        first, second = commands[kind, 1], commands[kind, 4]
        assert value_of(first, "--save") == value_of(second, "--load")
        assert value_of(first, "--save-interval") == value_of(first, "--train-iters") == "3"
        assert value_of(second, "--train-iters") == "7"
        assert "--load" not in first
        assert value_of(second, "--data-path") == str(tmp_path / "data" / "code")


def test_layout_reaches_the_command(tmp_path):
    command = plan_commands(tmp_path, Layout(tp=2, pp=2, ep=2))["llep", 1]
    assert value_of(command, "--nproc") == "4"
    assert value_of(command, "--tensor-model-parallel-size") == "2"
    assert value_of(command, "--pipeline-model-parallel-size") == "2"
    assert value_of(command, "--expert-tensor-parallel-size") == "1"


# Figures


def test_summary_of_known_curves():
    plain = make_log("plain EP", **{"iteration-time": np.array([1, 1, 1, 1, 6, 4, 2])})
    trained = Trained(
        runs=[],
        comparison=compare_runs(plain, make_log("LLEP", True), METRICS),
        watches={"plain": [make_watch(200), make_watch(400)], "llep": [make_watch(320)]},
        device=Device(name="cpu", note=None),
    )
    summary = summarise(trained, PHASES)
    assert summary["loss_max_rel_diff"] == 0
    assert summary["imbalance_before_max"] == 1.8
    assert summary["imbalance_after_max"] == 1.05
    assert summary["step_time_ratio"] == 2.0  # step 7 alone: the others are warm-up
    assert summary["peak_memory_ratio"] == 400 / 320
    assert summary["peak_memory_of_steps_mib"] == {"plain": 200, "llep": 160}
    assert summary["tokens_max_ratio"] == pytest.approx(1.8)
    assert summary["lent_mib_per_step"] == 4.0
    assert summary["lent_mib_total"] == 40.0
    assert summary["steps"] == 7


def test_the_first_steps_of_a_phase_are_not_timed():
    phase = Phase(name="x", domains=("d",), first_step=11, last_step=30)
    assert timed_steps(make_log("x").curve("lm loss"), [phase]) == (16, 30)


def test_a_log_that_lacks_a_step_is_refused(monkeypatch, tmp_path):
    runs = plan_runs(plan_phases(3, 5), Layout(), {}, tmp_path)
    monkeypatch.setattr(driver, "read_run", lambda folders, name: make_log(name))
    with pytest.raises(ValueError, match="plain EP has 7 of 8 steps"):
        compare_logs(runs, METRICS)


@pytest.mark.parametrize(("factor", "code"), [(1.0, 0), (1.5, 1), (np.nan, 1)])
def test_exit_code_says_whether_the_curves_part(tmp_path, monkeypatch, capsys, factor, code):
    loss = {"lm loss": make_log("x").curve("lm loss").values * factor}
    logs = {"plain EP": make_log("plain EP"), "LLEP": make_log("LLEP", True, **loss)}
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setattr(demo, "prepare_data", lambda out: ["nothing to do"])
    monkeypatch.setattr(driver, "execute_all", lambda runs, device: [make_watch(100)] * len(runs))
    monkeypatch.setattr(driver, "read_run", lambda folders, name: logs[name])
    argv = ["--mixture-steps", "3", "--domain-steps", "4", "--out", str(tmp_path / "out")]
    assert demo.main(argv) == code
    word = "THE LOSS CURVES DIFFER" if code else "The loss curves agree: at most 0.0e+00 apart"
    assert word in capsys.readouterr().out
    assert word in (tmp_path / "out" / "report.html").read_text()


# The whole, short


@pytest.fixture(scope="module")
def short_demo(tmp_path_factory):
    """Output folder and finished process of a demo with a tiny model and 3 + 4 steps."""
    out = tmp_path_factory.mktemp("demo")
    tiny = {"hidden-size": 32, "ffn-hidden-size": 64, "moe-ffn-hidden-size": 64, "kv-channels": 8}
    tiny |= {"seq-length": 32, "micro-batch-size": 4}
    command = [sys.executable, str(ROOT / "tools" / "demo.py"), "--out", str(out)]
    command += ["--mixture-steps", "3", "--domain-steps", "4"]
    for flag, value in tiny.items():
        command += ["--set", f"{flag}={value}"]
    return out, subprocess.run(command, capture_output=True, text=True, timeout=420, check=False)


@pytest.mark.timeout(480)
def test_short_demo_ends_well_and_says_so(short_demo):
    out, done = short_demo
    assert done.returncode == 0, done.stdout + done.stderr
    assert "The loss curves agree" in done.stdout
    assert str(out / "report.html") in done.stdout
    assert done.stdout.count("tools/launch.py") == 4
    assert "4/4" in done.stderr  # the bars reach their end


@pytest.mark.timeout(480)
def test_short_demo_writes_its_figures(short_demo):
    out, _ = short_demo
    summary = json.loads((out / "summary.json").read_text())
    assert 0 <= summary["loss_max_rel_diff"] < 1e-3
    assert 1 <= summary["imbalance_after_max"] <= summary["imbalance_before_max"] <= 2
    assert summary["tokens_max_ratio"] >= 1
    for name in ("step_time_ratio", "peak_memory_ratio"):
        assert 0.1 < summary[name] < 10
    assert summary["steps"] == 7
    assert summary["layout"].startswith("TP=1 PP=1 EP=2")
    assert {"machine", "megatron-core"} <= summary["machine"].keys()


@pytest.mark.timeout(480)
def test_short_demo_lends_experts(short_demo):
    summary = json.loads((short_demo[0] / "summary.json").read_text())
    assert summary["lent_mib_total"] > 0
    assert summary["fallback_rate"] < 1


@pytest.mark.timeout(480)
def test_short_demo_report_stands_alone(short_demo):
    out, _ = short_demo
    page = (out / "report.html").read_text()
    assert "data:image/png;base64,iVBOR" in page
    assert not re.search(r"https?://|<script|<link|src=\"(?!data:)", page)
    assert (out / "demo.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.timeout(480)
def test_short_demo_logs_to_wandb_without_a_network(short_demo):
    pytest.importorskip("wandb")
    out, _ = short_demo
    runs = sorted(out.glob("wandb/offline-run-*/*.wandb"))
    assert len(runs) == 4 + 3  # and the comparison's: both sides, the verdict
    assert sum(b"moe/llep/overload_factor_after" in run.read_bytes() for run in runs) == 2 + 1
