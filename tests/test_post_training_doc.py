"""docs/post_training.md: its commands run, its task is one, what it names exists."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_llep.training.rl.task import load_task

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs" / "post_training.md").read_text()
SMALL = shlex.split("""
    --hidden-size 32 --moe-ffn-hidden-size 64 --kv-channels 8 --train-iters 2
""")


def get_commands():
    blocks = re.findall(r"```sh\n(.*?)```", TEXT, flags=re.DOTALL)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]


def run(command, folder, *more):
    words = [sys.executable if word == "python" else word for word in shlex.split(command)]
    words = [str(ROOT / word) if word.startswith(("tools/", "finetune/")) else word for word in words]
    done = subprocess.run(
        [*words, *more], cwd=folder, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout
