"""tools/make_conversations.py: conversations that fine-tuning reads, the same each time."""

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_llep.training.chat import ByteChat
from megatron_llep.training.sft.conversations import read_conversations

ROOT = Path(__file__).resolve().parents[2]


def make(output, *options):
    command = [sys.executable, ROOT / "tools" / "make_conversations.py", *options]
    done = subprocess.run(
        [*command, "--output", output], capture_output=True, text=True, timeout=60, check=False
    )
    return done, list(read_conversations(output)) if done.returncode == 0 else []


@pytest.mark.parametrize("kind", ["arithmetic", "python-stdlib"])
def test_it_makes_what_it_is_asked_for_the_same_each_time(kind, tmp_path):
    done, first = make(tmp_path / "first.jsonl", kind, "--count", "50")
    assert done.stdout.endswith("50 conversations\n")
    assert len(first) == 50
    for conversation in first:
        assert all(any(example.trained) for example in ByteChat().encode(conversation.messages))
    make(tmp_path / "again.jsonl", kind, "--count", "50")
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "first.jsonl").read_bytes()
    _, other = make(tmp_path / "other.jsonl", kind, "--count", "50", "--seed", "1")
    assert [each.messages for each in other] != [each.messages for each in first]


@pytest.mark.parametrize("share", ["0.25", "1"])
def test_so_many_sums_are_right(share, tmp_path):
    _, conversations = make(
        tmp_path / "sums.jsonl", "arithmetic", "--count", "2000", "--right-share", share
    )
    right = 0
    for question, answer in (each.messages for each in conversations):
        a, b = question["content"].removesuffix("=").split("+")
        right += int(a) + int(b) == int(answer["content"])
    assert right / 2000 == pytest.approx(float(share), abs=0.04)


@pytest.mark.parametrize(
    ("options", "said"),
    [(["--right-share", "2"], "--right-share 2.0: give"), (["--count", "0"], "--count 0: give")],
)
def test_bad_options_are_refused(options, said, tmp_path):
    done, _ = make(tmp_path / "none.jsonl", "arithmetic", *options)
    assert done.returncode == 2
    assert said in done.stderr
