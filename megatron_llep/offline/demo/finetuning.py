"""What `make finetune` runs: data, and for SFT and RL the training commands."""

from dataclasses import dataclass, replace
from pathlib import Path

from megatron_llep.offline.compare.comparison import Metric
from megatron_llep.offline.compare.verdict import Tolerance
from megatron_llep.offline.compare.wandb_out import wandb_is_on
from megatron_llep.offline.demo.driver import LAUNCHER, ROOT, run_tool
from megatron_llep.offline.launch.execute import Run
from megatron_llep.offline.launch.flags import Flags, load_config
from megatron_llep.offline.launch.torchrun import count_gpus, layout_world_size
from megatron_llep.offline.launch.twins import checkpoint_of, plan_twins

WANDB_PROJECT = "megatron-llep-finetune"
RIGHT_SHARE = 0.6
"""Of the sums that SFT learns from; so that RL finds something to mend."""
HELD_OUT = 64
EVALUATIONS = 10
REWARD_WINDOW = 5
"""Steps over which a reward is averaged: a step's is that of 256 answers."""

# A metric of answers jumps by what a few of them do. The bound is on means of REWARD_WINDOW steps.
_OF_ANSWERS = Tolerance(absolute=True, early=0.05, early_steps=0, overall=0.15)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """SFT or RL: `name` for files, `title` for people, `shown` what the progress bar says."""

    name: str
    title: str
    config: Path
    shown: dict[str, str]
    metrics: tuple[Metric, ...]

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
    metrics=(
        # A wrong sum cannot be learned: the loss of a step jumps with how many there are in it.
        Metric(name="lm loss", label="answer loss", smooth=10),
        Metric(name="exact match", label="exact match", tolerance=_OF_ANSWERS),
    ),
)
RL = Stage(
    name="rl",
    title="GRPO",
    config=ROOT / "configs" / "rl-demo.yaml",
    shown={"reward": "mean reward"},
    metrics=(
        Metric(name="rl/mean_reward", label="reward", tolerance=_OF_ANSWERS, smooth=REWARD_WINDOW),
        Metric(name="rl/eval_exact_match", label="exact match", tolerance=None),
    ),
)


def plan_sft(steps: int, out: Path) -> list[Run]:
    """Make the data; plain, LLEP and a control, from the same weights, which the first run makes.

    Of the sums to train on some have wrong answers, of those to validate with none.

    Raises:
        RuntimeError: the data could not be made.
    """
    train, valid = (out / "data" / f"{kind}.jsonl" for kind in ("train", "valid"))
    for path, options in (
        (train, f"--right-share {RIGHT_SHARE} --seed 1"),
        (valid, f"--count {HELD_OUT} --seed 2"),
    ):
        told = [*options.split(), "--output", str(path)]
        run_tool("make_conversations.py", "arithmetic", *told)
    flags: Flags = {
        "--train-data-path": train,
        "--valid-data-path": valid,
        "--eval-iters": 1,
        "--sft-eval-answers": HELD_OUT,
        "--sft-max-new-tokens": 4,
    }
    return _plan(SFT, flags, steps, out, save=True)


def plan_rl(steps: int, out: Path) -> list[Run]:
    """The same from the weights of SFT's plain run: equal answers, as long as all agree."""
    flags: Flags = {"--pretrained-checkpoint": checkpoint_of(out / SFT.name, "plain")}
    return _plan(RL, flags, steps, out, save=False)


def _plan(stage: Stage, flags: Flags, steps: int, out: Path, *, save: bool) -> list[Run]:
    runs = plan_twins(
        stage.config,
        flags | {"--train-iters": steps, "--eval-interval": max(1, steps // EVALUATIONS)},
        out / stage.name,
        launcher=LAUNCHER,
        gpu_count=count_gpus(),
        wandb_project=WANDB_PROJECT if wandb_is_on() else None,
        save=save,
    )
    return [replace(run, title=f"{stage.title}, {run.title}", shown=stage.shown) for run in runs]
