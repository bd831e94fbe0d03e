"""Bad command lines end with a ValueError, from Megatron's real parser and before anything runs."""

import sys
from pathlib import Path

import pytest
from megatron.training.arguments import parse_args

from megatron_llep.integration.arguments import add_llep_arguments
from megatron_llep.offline.launch.flags import format_flags, load_config
from megatron_llep.training.hf.arguments import add_hf_arguments
from megatron_llep.training.rl.arguments import (
    add_rl_arguments,
    check_rl_arguments,
    find_rl_flags,
)

ROOT = Path(__file__).resolve().parents[2]
DEMO = {
    name: value
    for part in load_config(ROOT / "configs" / "rl-demo.yaml").values()
    for name, value in part.items()
}


@pytest.fixture
def check(monkeypatch):
    """Check the demo's command line with these flags; None leaves one out."""

    def check(changed: dict[str, object]) -> None:
        flags = {name: value for name, value in (DEMO | changed).items() if value is not None}
        argv = format_flags(flags)
        monkeypatch.setattr(sys, "argv", ["train_rl.py", *argv, *find_rl_flags(argv)])
        monkeypatch.setenv("WORLD_SIZE", "2")
        args = parse_args(
            lambda parser: add_rl_arguments(add_hf_arguments(add_llep_arguments(parser)))
        )
        assert args.perform_rl_step
        check_rl_arguments(args)

    return check


GOOD = {
    "demo": {},
    "several updates": {
        "--grpo-iterations": 2,
        "--global-batch-size": 128,
        "--save-interval": 8,
        "--micro-batch-size": 64,
    },
    "kl": {"--grpo-kl-beta": 0.1, "--pretrained-checkpoint": "somewhere"},
    "kl to a Hugging Face model": {"--grpo-kl-beta": 0.1, "--hf-load": "somewhere"},
    "replay": {"--rl-routing-replay": "R3"},
    "no evaluation": {"--eval-iters": 0, "--rl-prompts-per-eval": 0},
}


@pytest.mark.parametrize("name", GOOD)
def test_good_command_lines_pass(name, check):
    check(GOOD[name])


BAD = {
    "stages": ({"--pipeline-model-parallel-size": 2}, "--pipeline-model-parallel-size 2"),
    "context": ({"--context-parallel-size": 2}, "--context-parallel-size 2"),
    "mtp": ({"--mtp-num-layers": 1}, "--mtp-num-layers"),
    "evaluation": ({"--eval-iters": 5}, "--eval-iters 5: .* --eval-interval"),
    "temperature": ({"--rl-default-temperature": 0.7}, "--rl-default-temperature 0.7: .* use 1"),
    "top p": ({"--rl-default-top-p": 0.9}, "--rl-default-top-p 0.9"),
    "top k": ({"--rl-default-top-k": 5}, "--rl-default-top-k 5"),
    "dropout": ({"--hidden-dropout": 0.1}, "--hidden-dropout 0.1: .* give --hidden-dropout 0"),
    "kl": ({"--grpo-kl-beta": 0.1}, "--grpo-kl-beta 0.1: .*--pretrained-checkpoint FOLDER"),
    "kl by default": ({"--grpo-kl-beta": None}, "--grpo-kl-beta 0.001: .*--grpo-kl-beta 0"),
    "negative kl": ({"--grpo-kl-beta": "-0.1"}, "--grpo-kl-beta -0.1"),
    "prompts": ({"--grpo-prompts-per-step": 33}, "--grpo-prompts-per-step 33: .* the 2 data"),
    "batch": ({"--global-batch-size": 192}, "--global-batch-size 192: a rollout of 32 prompts"),
    "micro batch": ({"--micro-batch-size": 96}, "--global-batch-size 256: .*--micro-batch-size 96"),
    "group": ({"--grpo-group-size": 1}, "--grpo-group-size 1: .* use 2 or more"),
    "iterations": ({"--grpo-iterations": 0}, "--grpo-iterations 0"),
    "saving": (
        {"--grpo-iterations": 2, "--save-interval": 3},
        "--save-interval 3: a rollout is trained on for 2 steps",
    ),
    "exit": ({"--grpo-iterations": 2, "--exit-interval": 5}, "--exit-interval 5"),
    "too long": ({"--rl-max-new-tokens": 32}, "--rl-max-new-tokens 32: with --seq-length 32"),
    "no tokens": ({"--rl-max-new-tokens": 0}, "--rl-max-new-tokens 0"),
    "generation": ({"--rl-generation-batch-size": 0}, "--rl-generation-batch-size 0"),
    "replay": (
        {"--rl-routing-replay": "R2", "--num-experts": None, "--moe-llep": None},
        "--rl-routing-replay R2: .*no experts",
    ),
    "graphs": ({"--cuda-graph-impl": "local"}, "--cuda-graph-impl local"),
    "packing": ({"--rl-use-sequence-packing": True}, "--rl-use-sequence-packing"),
    "entropy": ({"--grpo-entropy-term-weight": 0.1}, "--grpo-entropy-term-weight"),
    "tokenizer": ({"--vocab-size": 200}, "--vocab-size 200"),
    "step": (
        {"--ckpt-step": 5, "--pretrained-checkpoint": "somewhere"},
        "--ckpt-step 5: .*latest_checkpointed_iteration.txt",
    ),
    "no training": ({"--skip-train": True}, "--skip-train"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_command_lines_are_refused(name, check):
    changed, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        check(changed)


def test_flags_that_follow_from_others():
    assert find_rl_flags([]) == ["--perform-rl-step", "--eval-iters", "0"]
    given = ["--perform-rl-step", "--eval-iters", "0"]
    assert find_rl_flags(given) == []
    for replay in (["--rl-routing-replay", "R2"], ["--rl-routing-replay=R3"]):
        assert find_rl_flags([*given, *replay]) == ["--moe-enable-routing-replay"]
        assert find_rl_flags([*given, *replay, "--moe-enable-routing-replay"]) == []
    assert find_rl_flags([*given, "--rl-routing-replay", "none"]) == []
