"""The README: its tables follow the code, its commands and snippets run.

`make demo`, `make finetune` and `make test` are what CI, tests/tools/test_demo.py and
test_finetune_demo.py run; here only what make would do is checked.
"""

import argparse
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_llep.integration.arguments import add_llep_arguments
from megatron_llep.layer import LLEPMoELayer
from megatron_llep.metrics import METRICS
from support.layout import Layout
from support.ranks import run_ranks
from support.training import Run, train

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


COMMAND_LINE = {
    "python -m megatron_llep plan --workload hot-80-4 --ranks 8 --experts 64": "experts lent",
    "python -m megatron_llep simulate --model gpt-oss-120b --workload hot-80-4 --ep 8": "optimum",
    "python -m megatron_llep calibrate --output machine.json": "prediction error",
    "python -m megatron_llep check configs/deepseek-v3.yaml": "1 of 1 start",
    "python -m megatron_llep doctor": "megatron-core",
}
"""A command, and a word of what it prints."""

RECORDED = {
    "python tools/launch.py configs/tiny.yaml --set --moe-llep-planner=observe -- --mock-data "
    "--train-iters 10 --moe-llep-record runs/routing": "busiest",
    "python -m megatron_llep view runs/routing --output runs/view.html": "view.html",
    "python -m megatron_llep tune runs/routing --output runs/llep.yaml": "machine",
    "python -m megatron_llep plan --trace runs/routing --step 3": "as it ran",
}
"""The same, of commands of which each needs the one before."""


def get_blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_flags_are_those_of_the_code():
    parser = add_llep_arguments(argparse.ArgumentParser())
    actions = [action for action in parser._actions if action.dest != "help"]
    rows = re.findall(r"^\| `(--moe-llep[\w-]*)` \| (\S+) \| (.*) \|$", README, flags=re.MULTILINE)
    assert [row[0] for row in rows] == [action.option_strings[0] for action in actions]
    for (_, default, text), action in zip(rows, actions, strict=True):
        assert text == action.help
        assert default == {False: "off", None: "none"}.get(action.default, str(action.default))


def test_the_metrics_are_those_of_the_code():
    for metric in METRICS:
        assert f"| `{metric.name}` | {metric.help} |" in README


def test_files_that_are_linked_exist():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    assert links
    for link in links:
        assert (ROOT / link).exists(), link


def test_every_command_is_known_here():
    commands = [line for block in get_blocks("sh") for line in block.splitlines()]
    assert commands == [
        "make demo",
        "make finetune",
        "make test",
        "make bench",
        "torchrun --nproc-per-node 8 pretrain/pretrain_gpt.py YOUR_MEGATRON_FLAGS --moe-llep",
        "torchrun --nproc-per-node 8 pretrain/pretrain_hybrid.py --hybrid-layer-pattern '*E*E' "
        "YOUR_MEGATRON_FLAGS --moe-llep",
        "python tools/launch.py configs/tiny.yaml --dry-run -- --mock-data",
        *RECORDED,
        *COMMAND_LINE,
    ]


@pytest.mark.parametrize(
    "command",
    [
        "make demo",
        "make demo TP=2 PP=2 EP=2",
        "make finetune",
        "make test",
        "make bench",
        "make gpu-check",
        "make test-long",
        "make lint",
    ],
)
def test_make_knows_its_targets(command):
    assert f"`{command}" in README or f"\n{command}" in README
    done = subprocess.run(
        [*shlex.split(command), "--dry-run"], cwd=ROOT, capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 0, done.stderr
    for word in command.split()[2:]:
        name, value = word.split("=")
        assert f"--{name.lower()} {value}" in done.stdout


def test_a_run_is_recorded_and_looked_at(tmp_path):
    for command, word in RECORDED.items():
        words = [sys.executable if word == "python" else word for word in shlex.split(command)]
        words = [str(ROOT / word) if (ROOT / word).is_file() else word for word in words]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=180)
        assert done.returncode == 0, done.stdout + done.stderr
        assert word in done.stdout, done.stdout
    assert (tmp_path / "runs" / "view.html").is_file()


def test_the_launcher_command_runs():
    (command,) = [
        line for block in get_blocks("sh") for line in block.splitlines() if "--dry-run" in line
    ]
    words = [sys.executable if word == "python" else word for word in shlex.split(command)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "pretrain_gpt.py" in done.stdout
    assert "--moe-llep" in done.stdout


@pytest.mark.parametrize("command", COMMAND_LINE)
def test_the_command_line_runs(command, tmp_path):
    words = [sys.executable if word == "python" else word for word in shlex.split(command)]
    words = [str(ROOT / word) if word.startswith("configs/") else word for word in words]
    if "calibrate" in words:
        words.append("--quick")  # a trial run
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert COMMAND_LINE[command] in done.stdout


def test_the_snippets_switch_llep_on():
    hook, wrap = get_blocks("python")

    def run_hook(chunks):
        names = {"model_config": SimpleNamespace(pre_wrap_hooks=[])}
        exec(hook, names)
        for function in names["model_config"].pre_wrap_hooks:
            function(chunks)

    def run_wrap(spec):
        names = {"spec": spec}
        exec(wrap, names)
        return names["spec"]

    def count_layers(chunks):
        return sum(isinstance(m, LLEPMoELayer) for chunk in chunks for m in chunk.modules())

    def work(rank, size):
        run = Run(layout=Layout(ep=2), steps=1)
        hooked = train(run, transform_model=run_hook, observe=count_layers)
        wrapped = train(run, transform_spec=run_wrap, observe=count_layers)
        assert hooked.observed == wrapped.observed == 2

    run_ranks(work, 2)
