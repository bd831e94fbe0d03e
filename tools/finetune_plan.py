"""What `make finetune` runs: data, and for SFT and RL a training command each way."""

import importlib.util
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from megatron_llep.offline.launch.execute import Run
from megatron_llep.offline.launch.flags import Flags, format_flags, load_config
from megatron_llep.offline.launch.torchrun import layout_world_size

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


def plan_sft(data: dict[str, Path], steps: int, out: Path) -> list[Run]:
    """Plain and LLEP, from one seed."""
    flags: Flags = {
        "--train-data-path": data["train"],
        "--valid-data-path": data["valid"],
        "--split": None,
        "--train-iters": steps,
        "--eval-interval": max(1, steps // EVALUATIONS),
        "--eval-iters": 1,
        "--sft-eval-answers": HELD_OUT,
        "--sft-max-new-tokens": 4,
    }
    return [
        _plan_run(SFT, kind, flags | _save(out / SFT.name / kind, steps), steps, out)
        for kind in ("plain", "llep")
    ]


def plan_rl(start: Path, steps: int, out: Path) -> list[Run]:
    """Plain and LLEP, from one checkpoint: the same answers, as long as both agree."""
    flags: Flags = {
        "--pretrained-checkpoint": start,
        "--train-iters": steps,
        "--eval-interval": max(1, steps // EVALUATIONS),
    }
    return [_plan_run(RL, kind, flags, steps, out) for kind in ("plain", "llep")]


def checkpoint_of(run_kind: str, out: Path) -> Path:
    """Where `plan_sft`'s run of that kind saves."""
    return out / SFT.name / run_kind / "checkpoint"


def _save(folder: Path, steps: int) -> Flags:
    return {
        "--save": folder / "checkpoint",
        "--save-interval": steps,
        "--no-save-optim": True,
        "--no-save-rng": True,
    }


def _plan_run(stage: Stage, kind: str, flags: Flags, steps: int, out: Path) -> Run:
    label = f"{stage.name}-{kind}"
    tensorboard = out / stage.name / kind / "tensorboard"
    logs: Flags = {"--tensorboard-dir": tensorboard, "--log-timers-to-tensorboard": True}
    if importlib.util.find_spec("wandb") is not None:
        logs |= {
            "--wandb-project": WANDB_PROJECT,
            "--wandb-exp-name": label,
            "--wandb-save-dir": out,
        }
    command = [sys.executable, str(ROOT / "tools" / "launch.py"), str(stage.config)]
    command += ["--no-llep"] if kind == "plain" else []
    for flag in [flag for flag, value in flags.items() if value is None]:
        command += ["--set", f"{flag}=false"]
    return Run(
        kind=kind,
        title=f"{stage.title}, {'LLEP' if kind == 'llep' else 'plain EP'}",
        command=[*command, "--", *format_flags(flags | logs)],
        log=out / "logs" / f"{label}.log",
        tensorboard=tensorboard,
        steps=steps,
        shown=stage.shown,
    )
