"""Running one training command: its log, its progress, its memory, and its end."""

import os
import re
import sys

import pytest

from megatron_llep.offline.launch.device import Device, choose_device
from megatron_llep.offline.launch.execute import Run, RunFailedError, execute, parse_step
from megatron_llep.offline.launch.memory import BEFORE_FIRST_STEP, BEFORE_MODEL

LINE = (
    " [2026-01-01 00:00:00.0] iteration       42/     200 | consumed samples:         3200 | "
    "elapsed time per iteration (ms): 587.8 | learning rate: 1.000000E-03 | "
    "global batch size:    16 | lm loss: 5.159468E+00 | overload_factor_before: 1.28 | "
    "overload_factor_after: 1.04 | max_tokens_before: 1315.50 | loss scale: 1.0 |\n"
)
CPU = Device(name="cpu", note=None)


def make_run(tmp_path, *command):
    return Run(
        kind="llep",
        title="LLEP",
        command=[sys.executable, *command],
        ranks=1,
        log=tmp_path / "logs" / "run.log",
        tensorboard=tmp_path,
        steps=200,
    )


def test_gpus_are_used_when_there_are_enough():
    assert choose_device(4, gpu_count=4, cores=1) == Device(name="gpu", note=None)


def test_too_few_gpus_are_named_and_hidden():
    device = choose_device(4, gpu_count=2, cores=8)
    assert device.name == "cpu"
    assert "4 ranks need 4 GPUs" in device.note
    assert device.environment()["CUDA_VISIBLE_DEVICES"] == ""


def test_more_ranks_than_cores_are_named():
    assert "4 ranks share 2 cores" in choose_device(4, gpu_count=0, cores=2).note
    assert choose_device(2, gpu_count=0, cores=2).note is None


def test_a_training_line_is_read():
    step, values = parse_step(LINE)
    assert step == 42
    assert values["lm loss"] == 5.159468
    assert values["elapsed time per iteration (ms)"] == 587.8
    assert (values["overload_factor_before"], values["overload_factor_after"]) == (1.28, 1.04)


@pytest.mark.parametrize("line", ["", "training ...", "saving at iteration       3 to x"])
def test_other_lines_are_no_steps(line):
    assert parse_step(line) is None


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        (LINE, "loss 5.159, 0.59 s, imbalance 1.28 -> 1.04"),
        (re.sub(r"overload\S+ \S+ \|", "", LINE), "loss 5.159, 0.59 s"),
    ],
)
def test_the_bar_shows_what_a_step_gave(tmp_path, capsys, line, shown):
    execute(make_run(tmp_path, "-c", f"print({line!r})"), CPU)
    lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
    # tqdm covers a longer line that was there before with blanks.
    bar = [line.rstrip() for line in lines if line.strip()][-1]
    assert "42/200" in bar
    assert bar.endswith(f"{shown}]")


def test_a_failed_run_shows_the_end_of_its_log(tmp_path):
    run = make_run(tmp_path, "-c", "print('first'); print('it broke here'); raise SystemExit(3)")
    with pytest.raises(RunFailedError, match=r"exit code 3") as failed:
        execute(run, CPU)
    assert "it broke here" in str(failed.value)
    assert str(run.log) in str(failed.value)
    assert run.log.read_text() == "first\nit broke here\n"


@pytest.mark.timeout(60)
def test_a_silent_run_is_stopped(tmp_path):
    run = make_run(tmp_path, "-c", "import os, time; print(os.getpid()); time.sleep(3600)")
    with pytest.raises(RunFailedError, match="printed nothing for 2 s"):
        execute(run, CPU, silence_s=2)
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
say({BEFORE_MODEL!r})
block = b"x" * (300 << 20)
del block
weights = b"x" * (20 << 20)
say({BEFORE_FIRST_STEP!r})
block = b"x" * (100 << 20)
del block
say("done")
"""
    script = tmp_path / "script.py"
    script.write_text(program)
    watch = execute(make_run(tmp_path, str(script), str(script)), CPU)
    mib = 2**20
    assert 119 * mib < watch.worst_peak < 140 * mib
    assert 99 * mib < watch.worst_of_steps < 115 * mib
