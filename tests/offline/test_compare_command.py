"""finetune/compare.py: options, files, exit codes, and real runs that it starts itself."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from run_logs import make_loss, rounded, write_events

from megatron_llep.offline.compare.command import main
from megatron_llep.offline.compare.read import read_run

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "finetune" / "compare.py"
LAUNCHER = ROOT / "tools" / "launch.py"
TINY = ROOT / "configs" / "tiny.yaml"
LOSS = make_loss(60)


@pytest.fixture
def compare(tmp_path, monkeypatch):
    """Run the command where plain, llep, control and faster are; gives the exit code."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    accuracy = {"accuracy": [0.1, 0.6, 0.95]}
    write_events(tmp_path / "plain", {"lm loss": LOSS, **accuracy}, step_seconds=1.25)
    write_events(tmp_path / "llep", {"lm loss": rounded(LOSS, 1), **accuracy})
    write_events(tmp_path / "control", {"lm loss": rounded(LOSS, 2)})
    write_events(tmp_path / "faster", {"lm loss": make_loss(60, speed=1.01)})

    def run(*argv):
        return main(argv, description="", launcher=LAUNCHER)

    return run


def test_runs_that_agree(compare, tmp_path, capsys):
    argv = "plain llep --control control --names EP LLEP --out out --target accuracy=0.9"
    assert compare(*shlex.split(argv)) == 0
    printed = capsys.readouterr().out
    assert "EP and LLEP agree" in printed
    assert re.search(r"time to accuracy 0.9 +2.5 s \(step 3\) +2.0 s \(step 3\) +1.25x", printed)
    figures = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert figures["comparison"]["agree"] is True
    assert figures["comparison"]["metrics"]["accuracy"]["target"]["speedup"] == 1.25
    assert figures["comparison"]["metrics"]["lm loss"]["target"]["speedup"] == pytest.approx(1.25)
    page = (tmp_path / "out" / "compare.html").read_text()
    assert "data:image/png;base64,iVBOR" in page
    assert "EP and LLEP agree" in page
    assert not re.search(r"https?://|<script|<link|src=\"(?!data:)", page)
    assert (tmp_path / "out" / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "out" / "wandb").exists()


def test_runs_that_differ(compare, tmp_path, capsys):
    assert compare("plain", "faster", "--out", "out") == 1
    printed = capsys.readouterr().out
    assert "PLAIN AND FASTER DIFFER: lm loss" in printed
    assert "No control was given" in printed
    assert "DIFFER" in (tmp_path / "out" / "compare.html").read_text()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_run_that_diverged_differs_and_is_drawn(compare, tmp_path, value):
    write_events(tmp_path / "broken", {"lm loss": [*LOSS[:30], *([value] * 30)]})
    assert compare("plain", "broken", "--out", "out", "--control", "control") == 1
    assert (
        json.loads((tmp_path / "out" / "compare.json").read_text())["comparison"]["agree"] is False
    )


def test_tolerances_are_those_that_are_stated(compare):
    wide = "--tolerance 0.1 --early-steps 0"
    assert compare(*shlex.split(f"plain faster {wide}")) == 0
    assert compare(*shlex.split(f"plain faster {wide} --tolerance 'lm loss=0.001'")) == 1
    narrow = "--tolerance 0.01 --early-steps 0"
    assert compare(*shlex.split(f"plain faster {narrow}")) == 0
    assert compare(*shlex.split(f"plain faster {narrow} --control control")) == 1
    assert compare(*shlex.split("plain llep --absolute accuracy=0.01")) == 0


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("plain", "1 folders: give two, or --config"),
        ("plain llep --config x.yaml", "give two folders or --config, not both"),
        ("plain nowhere", "nowhere: no such folder"),
        ("plain llep --metric reward", "logged no 'reward'; it has: accuracy, lm loss"),
        ("plain llep --target accuracy", "--target 'accuracy': write NAME=NUMBER"),
        ("plain llep --tolerance accuracy=x", "--tolerance 'accuracy=x': write NUMBER or NAME"),
        ("plain llep --tolerance -1", "overall tolerance -1"),
        ("plain llep --early-tolerance 0", "early tolerance 0"),
        ("plain llep --smooth 0", "smooth 0"),
        ("plain llep --control-factor 0.5", "control factor 0.5"),
        ("plain llep -- --lr 1", "--lr after --"),
        ("--config nowhere.yaml", "nowhere.yaml: no such file"),
        (f"--config {TINY} --control other", "--control other: with --config one of"),
        (f"--config {TINY} --script nowhere.py", "--script nowhere.py: no such file"),
        (f"--config {TINY} -- --save x", "--save: each run gets a folder"),
    ],
)
def test_unusable_options(compare, capsys, argv, message):
    with pytest.raises(SystemExit) as stopped:
        compare(*shlex.split(argv))
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.timeout(120)
def test_the_comparison_is_a_group_of_wandb_runs(compare, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    assert compare(*shlex.split("plain llep --out out --wandb-project p")) == 0
    wandb.teardown()  # as at the end of a program: all is written
    folders = sorted((tmp_path / "out" / "wandb").glob("offline-run-*"))
    assert len(folders) == 3
    logs = [read_run(folder) for folder in folders]
    curves = [log.curves["lm loss"] for log in logs if "lm loss" in log.curves]
    assert len(curves) == 2
    for name, curve in zip(("plain", "llep"), curves, strict=True):
        written = read_run(tmp_path / name).curve("lm loss")
        assert curve.steps.tolist() == written.steps.tolist()
        assert curve.values == pytest.approx(written.values)
    words = b"".join(file.read_bytes() for file in (tmp_path / "out").rglob("*.wandb"))
    assert b"plain and llep agree" in words
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert compare(*shlex.split("plain llep --out off --wandb-project p")) == 0
    assert not (tmp_path / "off" / "wandb").exists()


# Real runs, slow for their starts; `make demo` compares such runs too

SMALL = shlex.split("""
    --mock-data --num-layers 2 --hidden-size 32 --ffn-hidden-size 64 --moe-ffn-hidden-size 64
    --kv-channels 8 --seq-length 32 --max-position-embeddings 32 --micro-batch-size 2
    --global-batch-size 8 --lr-warmup-fraction 0 --lr-decay-style constant --train-iters 12
""")


def run(*command):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=380,
        check=False,
    )


@pytest.fixture(scope="module")
def real_runs(tmp_path_factory):
    """Output folder and finished process of a comparison that started its runs itself."""
    out = tmp_path_factory.mktemp("compare") / "out"
    argv = [SCRIPT, "--config", TINY, "--out", out, "--wandb-project", "p", "--", *SMALL]
    return out, run(*argv, "--moe-llep-imbalance-threshold", "1.0")


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_plain_llep_and_control_are_started_and_agree(real_runs):
    out, done = real_runs
    assert done.returncode == 0, done.stdout + done.stderr
    assert "plain EP and LLEP agree" in done.stdout
    assert done.stdout.count("tools/launch.py") == 4
    figures = json.loads((out / "compare.json").read_text())["comparison"]["metrics"]["lm loss"]
    assert figures["steps"] == 12
    # Another order of sums: rounding, but not nothing.
    assert 0 < figures["control_largest_difference"] < 1e-5
    assert figures["control_factor"] == 10
    assert read_run(out / "llep").curve("moe/llep/lent_experts").values.max() > 0


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_wandb_and_tensorboard_of_a_real_run_say_the_same(real_runs):
    pytest.importorskip("wandb")
    board = read_run(real_runs[0] / "llep" / "tensorboard")
    wandb = read_run(real_runs[0] / "llep" / "wandb")
    for name in ("lm loss", "grad-norm", "moe/llep/overload_factor_before"):
        assert wandb.curve(name).steps.tolist() == board.curve(name).steps.tolist()
        assert wandb.curve(name).values == pytest.approx(board.curve(name).values)
    assert wandb.seconds == pytest.approx(board.seconds, rel=0.3, abs=0.3)
