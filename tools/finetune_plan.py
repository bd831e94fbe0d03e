"""What `make finetune` runs: data, and for SFT and RL the training commands."""

import importlib.util
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_llep.offline.launch.execute import Run
from megatron_llep.offline.launch.flags import Flags, load_config
from megatron_llep.offline.launch.torchrun import layout_world_size
from megatron_llep.offline.launch.twins import checkpoint_of, plan_twins

ROOT = Path(__file__).resolve().parents[1]
WANDB_PROJECT = "megatron-llep-finetune"
RIGHT_SHARE = 0.6
"""Of the sums that SFT learns from; so that RL finds something to mend."""
HELD_OUT = 64
EVALUATIONS = 10


@dataclass(frozen=True, kw_only=True)
class Stage:
    """SFT or RL: `name` for files, `title` for people, `shown` what the progress bar says."""

    name: str
    title: str
    config: Path
    shown: dict[str, str]

    def flags(self) -> Flags:
        """Of the configuration, without LLEP's."""
        sections = load_config(self.config)
        return sections["MODEL_ARGS"] | sections["LAYOUT_ARGS"]

    @property
    def world_size(self) -> int:
        """Processes that the layout fills."""
        return layout_world_size(self.flags())


SFT = Stage(
    name="sft",
    title="fine-tuning",
    config=ROOT / "configs" / "sft-demo.yaml",
    shown={"loss": "lm loss"},
)
RL = Stage(
    name="rl",
    title="GRPO",
    config=ROOT / "configs" / "rl-demo.yaml",
    shown={"reward": "mean reward"},
)


def prepare_data(folder: Path) -> dict[str, Path]:
    """Write the conversations; the same ones each time.

    Returns:
        Of training, some with wrong answers, and of validation, all right.

    Raises:
        RuntimeError: the tool failed; the message has its output.
    """
    kinds = {
        "train": ["--right-share", str(RIGHT_SHARE), "--seed", "1"],
        "valid": ["--count", str(HELD_OUT), "--seed", "2"],
    }
    paths = {}
    for kind, options in kinds.items():
        paths[kind] = folder / f"{kind}.jsonl"
        command = [sys.executable, str(ROOT / "tools" / "make_conversations.py"), "arithmetic"]
        command += [*options, "--output", str(paths[kind])]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return paths


def plan_sft(data: dict[str, Path], steps: int, out: Path, gpu_count: int) -> list[Run]:
    """Plain, LLEP and a control, from the same weights, which the first run makes."""
    flags: Flags = {
        "--train-data-path": data["train"],
        "--valid-data-path": data["valid"],
        "--train-iters": steps,
        "--eval-interval": max(1, steps // EVALUATIONS),
        "--eval-iters": 1,
        "--sft-eval-answers": HELD_OUT,
        "--sft-max-new-tokens": 4,
    }
    return _plan(SFT, flags, out, gpu_count, save=True)


def plan_rl(steps: int, out: Path, gpu_count: int) -> list[Run]:
    """The same from the weights of SFT's plain run: equal answers, as long as all agree."""
    flags: Flags = {
        "--pretrained-checkpoint": checkpoint_of(out / SFT.name, "plain"),
        "--train-iters": steps,
        "--eval-interval": max(1, steps // EVALUATIONS),
    }
    return _plan(RL, flags, out, gpu_count, save=False)


def _plan(stage: Stage, flags: Flags, out: Path, gpu_count: int, *, save: bool) -> list[Run]:
    has_wandb = importlib.util.find_spec("wandb") is not None
    runs = plan_twins(
        stage.config,
        flags,
        out / stage.name,
        launcher=ROOT / "tools" / "launch.py",
        gpu_count=gpu_count,
        wandb_project=WANDB_PROJECT if has_wandb else None,
        save=save,
    )
    return [replace(run, title=f"{stage.title}, {run.title}", shown=stage.shown) for run in runs]
