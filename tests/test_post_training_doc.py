"""docs/post_training.md: its commands run, its task is one, what it links to exists."""

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
    --hidden-size 32 --moe-ffn-hidden-size 64 --kv-channels 8 --train-iters 2 --save-interval 2
""")

ELSEWHERE = {
    "python tools/convert_hf.py --hf-load MODEL --save CHECKPOINT": "hf/test_convert.py",
    "python tools/convert_hf.py --load CHECKPOINT --hf-config MODEL --hf-save NEW": (
        "hf/test_convert.py"
    ),
    "python finetune/compare.py runs/finetune/sft/plain runs/finetune/sft/llep "
    '--target "exact match=0.9"': "tools/test_finetune_demo.py",
    "python finetune/compare.py --config configs/sft-demo.yaml -- --data-path data/sums.jsonl": (
        "offline/test_compare_command.py"
    ),
}
"""Commands, and where they are run on what they name."""


def get_blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", TEXT, flags=re.DOTALL)


COMMANDS = [line for block in get_blocks("sh") for line in block.splitlines()]


def run(command, folder, *more):
    words = [sys.executable if word == "python" else word for word in shlex.split(command)]
    # The documents' paths are those of the checkout, and of data beside it.
    words = [str(ROOT / word) if (ROOT / word).is_file() else word for word in words]
    done = subprocess.run(
        [*words, *more], cwd=folder, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def test_every_command_is_run():
    assert len(COMMANDS) == 8
    assert set(COMMANDS[3:]) - set(ELSEWHERE) == {COMMANDS[5]}, "the recipe, below"
    for place in ELSEWHERE.values():
        assert (ROOT / "tests" / place).is_file()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_from_nothing_to_a_fine_tuned_model(tmp_path):
    make, sft, rl = COMMANDS[:3]
    run(make, tmp_path, "--count", "200")
    assert "lm loss" in run(sft, tmp_path, *SMALL)
    # From the weights of the second command: another start has none to load.
    log = run(rl, tmp_path, *SMALL, "--rl-prompts-per-eval", "4")
    assert "mean reward" in log
    assert "successfully loaded checkpoint from runs/sft" in log


def test_the_recipe_is_a_command(tmp_path):
    recipe = COMMANDS[5].replace(" -- ", " --nproc 8 --dry-run -- ")
    command = run(recipe, tmp_path)
    assert "finetune/sft_gpt.py" in command
    assert "--hf-load MODEL" in command


def test_the_task_is_one(tmp_path):
    (code,) = get_blocks("python")
    (tmp_path / "words.py").write_text(code)
    task = load_task(f"{tmp_path / 'words.py'}:make_task")
    prompt = task.held_out[0]
    assert task.reward(prompt, f" {prompt.answer}\n") == 1
    assert task.reward(prompt, "no") == 0


def test_links_lead_somewhere():
    for link in re.findall(r"\]\(([^)]+)\)", TEXT):
        assert (ROOT / "docs" / link).is_file()
