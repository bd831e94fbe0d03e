"""tools/demo.py: layouts, commands, log parsing, the verdict, and one short run of the whole."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import demo  # noqa: E402
import demo_measure  # noqa: E402
import demo_plan  # noqa: E402
import demo_run  # noqa: E402
from demo_measure import Curves  # noqa: E402
from demo_plan import Device, Layout, Phase, Run  # noqa: E402

LINE = (
    " [2026-01-01 00:00:00.0] iteration       42/     200 | consumed samples:         3200 | "
    "elapsed time per iteration (ms): 587.8 | learning rate: 1.000000E-03 | "
    "global batch size:    16 | lm loss: 5.159468E+00 | overload_factor_before: 1.28 | "
    "overload_factor_after: 1.04 | max_tokens_before: 1315.50 | loss scale: 1.0 |\n"
)
PHASES = demo_plan.plan_phases(3, 4)
CPU = Device(name="cpu", note=None)


def make_curves(**changes):
    """Seven steps in two phases (3 + 4), two layers; easy numbers."""
    before = np.array([1.1, 1.2, 1.3, 1.8, 1.6, 1.4, 1.2])
    fields = {
        "loss": np.linspace(6, 3, 7),
        "seconds": np.array([np.nan, 9, 9, np.nan, 3, 2, 1]),
        "peak_bytes": np.array([200, 400.0]) * 2**20,
        "step_bytes": np.array([100, 300.0]) * 2**20,
        "llep": {
            "overload_factor_before": before,
            "overload_factor_after": np.full(7, 1.05),
            "overload_factor_before_layers": np.stack([before, before]),
            "overload_factor_after_layers": np.full((2, 7), 1.05),
            "max_tokens_before": before * 1000,
            "max_tokens_after": np.full(7, 1000.0),
            "lent_experts": np.array([9, 9, 9, 1, 2, 3, 2.0]),
            "lent_mib": np.array([8, 8, 8, 2, 4, 6, 4.0]),
            "fallback_rate": np.full(7, 0.5),
            "plan_ms": np.full(7, 2.0),
        },
    }
    return Curves(**{**fields, **changes})


def make_long_curves():
    """Thirty steps."""
    ones = np.ones(30)
    llep = {name: np.ones((1, 30) if "layers" in name else 30) for name in make_curves().llep}
    return make_curves(loss=np.linspace(6, 3, 30), seconds=ones, llep=llep)


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
        demo_plan.check_layout(layout, {})


@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2, pp=2), Layout(ep=4, etp=2, tp=2)])
def test_a_good_layout_is_accepted(layout):
    demo_plan.check_layout(layout, {})


def test_an_override_counts_in_the_layout_check():
    demo_plan.check_layout(Layout(ep=3), {"--num-experts": 6})


def test_a_bad_layout_ends_the_script_before_it_writes(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        demo.main(["--ep", "3", "--out", str(tmp_path / "out")])
    assert stopped.value.code == 2
    assert "--ep 3" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_gpus_are_used_when_there_are_enough():
    assert demo_plan.choose_device(4, gpu_count=4, cores=1) == Device(name="gpu", note=None)


def test_too_few_gpus_are_named_and_hidden():
    device = demo_plan.choose_device(4, gpu_count=2, cores=8)
    assert device.name == "cpu"
    assert "4 ranks need 4 GPUs" in device.note
    assert device.environment()["CUDA_VISIBLE_DEVICES"] == ""


def test_more_ranks_than_cores_are_named():
    assert "4 ranks share 2 cores" in demo_plan.choose_device(4, gpu_count=0, cores=2).note
    assert demo_plan.choose_device(2, gpu_count=0, cores=2).note is None


# Commands


def plan_commands(tmp_path, layout=None):
    layout = layout or Layout()
    runs = demo_plan.plan_runs(PHASES, layout, {}, tmp_path, layout.world_size())
    return {(run.kind, run.phase.first_step): run.command for run in runs}


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


# Progress and failures


def test_a_training_line_is_read():
    step = demo_run.parse_step(LINE)
    assert step.step == 42
    assert step.values == {"loss": 5.159468, "ms": 587.8, "before": 1.28, "after": 1.04}


def test_a_line_of_plain_ep_has_no_imbalance():
    step = demo_run.parse_step(re.sub(r"overload\S+ \S+ \|", "", LINE))
    assert step.values == {"loss": 5.159468, "ms": 587.8}


@pytest.mark.parametrize("line", ["", "training ...", "saving at iteration       3 to x"])
def test_other_lines_are_no_steps(line):
    assert demo_run.parse_step(line) is None


def make_run(tmp_path, program):
    return Run(
        kind="llep",
        phase=PHASES[0],
        command=[sys.executable, "-c", program],
        log=tmp_path / "logs" / "run.log",
        tensorboard=tmp_path,
    )


def test_a_failed_run_shows_the_end_of_its_log(tmp_path):
    run = make_run(tmp_path, "print('first'); print('it broke here'); raise SystemExit(3)")
    with pytest.raises(demo_run.RunFailedError, match=r"exit code 3") as failed:
        demo_run.execute(run, CPU)
    assert "it broke here" in str(failed.value)
    assert str(run.log) in str(failed.value)
    assert run.log.read_text() == "first\nit broke here\n"


@pytest.mark.timeout(60)
def test_a_silent_run_is_stopped(tmp_path):
    program = f"import os, time; print(os.getpid()); time.sleep({60 * 60})"
    run = make_run(tmp_path, program)
    with pytest.raises(demo_run.RunFailedError, match="printed nothing for 2 s"):
        demo_run.execute(run, CPU, silence_s=2)
    with pytest.raises(ProcessLookupError):
        os.kill(int(run.log.read_text()), 0)


@pytest.mark.timeout(60)
def test_memory_is_counted_from_the_marks_on(tmp_path):
    # The block before the first step must not count, the one after it must.
    program = f"""
import os, subprocess, sys, time
if "RANK" not in os.environ:
    sys.exit(subprocess.run([sys.executable, *sys.argv[1:]], env=os.environ | dict(RANK="0"))
             .returncode)
say = lambda text: (print(text, flush=True), time.sleep(1.0))
say({demo_run.BEFORE_MODEL!r})
block = b"x" * (300 << 20)
del block
weights = b"x" * (20 << 20)
say({demo_run.BEFORE_FIRST_STEP!r})
block = b"x" * (100 << 20)
del block
say("done")
"""
    script = tmp_path / "script.py"
    script.write_text(program)
    run = make_run(tmp_path, "")
    run = Run(**{**run.__dict__, "command": [sys.executable, str(script), str(script)]})
    watch = demo_run.execute(run, CPU)
    mib = 2**20
    assert 119 * mib < watch.peak[0] - watch.libraries[0] < 140 * mib
    assert 99 * mib < watch.peak[0] - watch.start[0] < 115 * mib


# Figures


def test_summary_of_known_curves():
    plain = make_curves(llep={}, seconds=np.array([np.nan, 1, 1, np.nan, 6, 4, 2]))
    llep = make_curves(peak_bytes=np.array([320, 100.0]) * 2**20)
    summary = demo_measure.summarise(plain, llep, PHASES)
    assert summary["loss_max_rel_diff"] == 0
    assert summary["imbalance_before_max"] == 1.8
    assert summary["imbalance_after_max"] == 1.05
    assert summary["step_time_ratio"] == 2.0  # step 7 alone: the others are warm-up
    assert summary["peak_memory_ratio"] == 400 / 320
    assert summary["tokens_max_ratio"] == pytest.approx(1.8)
    assert summary["lent_mib_per_step"] == 4.0
    assert summary["lent_mib_total"] == 40.0
    assert summary["steps"] == 7


def test_the_first_steps_of_a_phase_are_not_timed():
    phase = Phase(name="x", domains=("docs",), first_step=11, steps=20)
    timed = demo_measure.timed_steps(phase)
    assert (timed.start, timed.stop) == (10 + demo_measure.WARM_UP_STEPS, 30)


@pytest.mark.parametrize("kind", ["early drift", "drift", "nan"])
def test_curves_that_part_are_found(kind):
    phases = demo_plan.plan_phases(20, 10)
    same = make_long_curves()
    loss = same.loss.copy()
    if kind == "early drift":
        loss[5] *= 1 + 2 * demo_measure.EARLY_TOLERANCE
    else:
        loss[25] *= np.nan if kind == "nan" else 1 + 2 * demo_measure.LOSS_TOLERANCE
    summary = demo_measure.summarise(same, replace(same, loss=loss), phases)
    assert not demo_measure.losses_agree(summary)


def test_rounding_is_no_parting():
    same = make_long_curves()
    growing = same.loss * (1 + 1e-2 * np.linspace(0, 1, 30) ** 20)
    phases = demo_plan.plan_phases(20, 10)
    assert demo_measure.losses_agree(
        demo_measure.summarise(same, replace(same, loss=growing), phases)
    )


def test_a_log_that_lacks_a_step_is_refused():
    scalars = {"lm loss": np.array([[1, 6.0], [3, 4.0]])}
    with pytest.raises(RuntimeError, match="mixture lacks steps of 'lm loss'"):
        demo_measure.take_steps(scalars, "lm loss", PHASES[0])


@pytest.mark.parametrize(("factor", "code"), [(1.0, 0), (1.5, 1)])
def test_exit_code_says_whether_the_curves_part(tmp_path, monkeypatch, capsys, factor, code):
    curves = {"plain": make_curves(llep={}), "llep": make_curves(loss=make_curves().loss * factor)}
    monkeypatch.setattr(demo_plan, "prepare_data", lambda out: ["nothing to do"])
    monkeypatch.setattr(demo_run, "execute", lambda run, device: None)
    monkeypatch.setattr(demo_measure, "collect_curves", lambda runs: curves[runs[0][0].kind])
    tmp_path.joinpath("out").mkdir()
    argv = ["--mixture-steps", "3", "--domain-steps", "4", "--out", str(tmp_path / "out")]
    assert demo.main(argv) == code
    assert ("PART" in capsys.readouterr().out) == bool(code)
    assert ("PART" in (tmp_path / "out" / "report.html").read_text()) == bool(code)


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
    assert {"CPU", "cores", "torch", "megatron-core"} <= summary["machine"].keys()


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
    assert len(runs) == 4
    assert sum(b"moe/llep/overload_factor_after" in run.read_bytes() for run in runs) == 2
