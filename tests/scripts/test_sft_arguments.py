"""Fine-tuning's command lines: what follows from others, what is refused before anything starts."""

import json
import sys

import pytest
import torch.distributed as dist
from script_runs import ROOT, config_flags

from megatron_llep.training.arguments import read_arguments
from megatron_llep.training.sft.arguments import (
    add_sft_arguments,
    check_sft,
    flags_of_sft,
    options_of_sft,
)

CONFIG = ROOT / "configs" / "sft-demo.yaml"


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"prompt": "3+4=", "completion": "7"}) + "\n")
    return str(path)


@pytest.fixture
def read(monkeypatch, unset_arguments):
    def read(*flags, without=()):
        flags = config_flags(CONFIG, *flags, without=without)
        monkeypatch.setattr(sys, "argv", ["sft_gpt.py", *flags, *flags_of_sft(flags)])
        monkeypatch.setenv("WORLD_SIZE", "2")
        return read_arguments(add_sft_arguments, check_sft)

    return read


def test_the_loss_weighs_tokens_and_megatrons_sft_is_taken_over(read, data):
    by_token = "--calculate-per-token-loss"
    args, llep = read("--data-path", data, "--sft", without=[by_token])
    assert llep.enabled
    assert args.calculate_per_token_loss
    options_of_sft(args)
    assert not args.sft, "or the loop would average evaluation over micro-batches"
    assert flags_of_sft([by_token]) == []


BAD = {
    "no data": ([], "--data-path is missing", "JSONL"),
    "mock": (["--mock-data"], "--mock-data", "tools/make_conversations.py"),
    "no file": (["--data-path", "nowhere.jsonl"], "--data-path nowhere.jsonl", "no such file"),
    "blend": (["--data-path", "1", "DATA", "1", "nowhere.jsonl"], "--data-path nowhere", "JSONL"),
    "context": (
        ["--data-path", "DATA", "--context-parallel-size", "2"],
        "--context-parallel-size 2",
        "leave the flag out",
    ),
    "mtp": (["--data-path", "DATA", "--mtp-num-layers", "1"], "--mtp-num-layers", "leave"),
    "pipeline": (
        [
            *("--data-path", "DATA", "--pipeline-model-parallel-size", "2"),
            *("--micro-batch-size", "2"),
        ],
        "--micro-batch-size 2",
        "give 1",
    ),
    "answers in a pipeline": (
        [
            *("--data-path", "DATA", "--pipeline-model-parallel-size", "2"),
            *("--micro-batch-size", "1", "--sft-eval-answers", "8"),
        ],
        "--sft-eval-answers 8",
        "leave the flag out",
    ),
    "tokenizer": (
        ["--data-path", "DATA", "--tokenizer-type", "SFTTokenizer"],
        "--tokenizer-type SFTTokenizer",
        "HuggingFaceTokenizer",
    ),
    "vocabulary": (
        ["--data-path", "DATA", "--vocab-size", "257"],
        "--vocab-size 257",
        "--vocab-size 262",
    ),
    "llep": (["--data-path", "DATA", "--moe-llep-planner", "best"], "--moe-llep-planner", "choose"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_settings_name_flag_value_and_remedy(case, read, data):
    flags, named, remedy = BAD[case]
    with pytest.raises(ValueError, match=r"^--") as error:
        read(*(data if flag == "DATA" else flag for flag in flags))
    assert str(error.value).startswith(named)
    assert remedy in str(error.value)
    assert not dist.is_initialized()


def test_the_first_line_of_each_file_is_read_at_once(read, tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "hello"}\n')
    with pytest.raises(ValueError, match=r"text\.jsonl:1: no known key"):
        read("--data-path", str(path))
