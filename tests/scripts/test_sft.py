"""The real fine-tuning script: losses, answers, resume, layouts."""

import re
import subprocess
import sys

import pytest
from script_runs import ROOT, run_config

from support.versions import needs_megatron

CONFIG = ROOT / "configs" / "sft-demo.yaml"
SCRIPT = ROOT / "finetune" / "sft_gpt.py"
STEPS, HALF = 6, 3
SMALL = ["--hidden-size", 32, "--moe-ffn-hidden-size", 64, "--kv-channels", 8, "--seq-length", 64]
EVALUATION = ["--eval-interval", HALF, "--eval-iters", 1, "--sft-eval-answers", 5]
EVALUATION += ["--sft-max-new-tokens", 4]

pytestmark = pytest.mark.timeout(600)  # a fixture may start the script twice


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "sums.jsonl"
    command = [sys.executable, ROOT / "tools" / "make_conversations.py", "arithmetic"]
    subprocess.run([*command, "--count", "500", "--output", path], check=True, timeout=60)
    return path


@pytest.fixture(scope="module")
def train(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")

    def train(name, *flags, llep, load=None, **options):
        common = [
            "--data-path",
            data,
            "--train-iters",
            STEPS,
            "--make-vocab-size-divisible-by",
            192,
        ]
        saving = ["--save", folder / name, "--save-interval", HALF]
        if load:
            saving += ["--load", folder / load, "--ckpt-step", HALF]
        flags = [*SMALL, *common, *saving, *EVALUATION, *flags]
        return run_config(CONFIG, flags, llep=llep, script=SCRIPT, **options)

    return train


@pytest.fixture(scope="module")
def plain(train):
    return train("plain", llep=False)


def read_evaluations(log):
    losses = re.findall(r"validation loss at iteration (\d+) \| lm loss value: (\S+)", log.text)
    return {int(step): float(loss) for step, loss in losses}


def test_resumed_with_llep_it_goes_on_as_plain(train, plain):
    resumed = train("lending", llep=True, load="plain", as_user=True)
    assert sorted(resumed.losses) == [4, 5, 6]
    for step in (4, 6):  # Megatron's second line after a start averages two steps
        assert resumed.losses[step] == pytest.approx(plain.losses[step], rel=1e-5)
    assert any(value > 0 for value in resumed.read("lent_experts").values())
    evaluated = read_evaluations(resumed)
    assert evaluated[STEPS] == pytest.approx(read_evaluations(plain)[STEPS], rel=1e-5)


def test_answers_are_evaluated_once_an_evaluation(plain):
    found = re.findall(r"answers at iteration (\d+) \| exact match: (\S+) \|", plain.text)
    assert [int(step) for step, _ in found] == [HALF, STEPS]
    assert all(0 <= float(share) <= 1 for _, share in found)


@needs_megatron((0, 19), "several packs a micro-batch under tensor parallelism")
def test_tensor_parallel_on_megatrons_sft_flag(train):
    layout = {"tensor-model-parallel-size": 2, "expert-tensor-parallel-size": 1}
    layout["sequence-parallel"] = True
    log = train("tensor", "--sft", "--sft-no-packing", "--bf16", llep=True, layout=layout)
    assert len(log.losses) == STEPS
    assert log.losses[STEPS] < log.losses[1]
