"""Fine-tune a small MoE model and train it with GRPO, with plain EP and with LLEP, and compare.

    python tools/finetune_demo.py
    python tools/finetune_demo.py --sft-steps 20 --rl-steps 5 --out /tmp/finetune

SFT teaches sums, four in ten of them wrong; GRPO then rewards right ones. Both run with plain EP,
with LLEP, and as a control with plain EP in another order of summation, all three from the same
weights and seed: those of SFT's plain run for GRPO. Writes sft.html and rl.html, with their
pictures and figures, logs, and TensorBoard and (where wandb is installed) offline wandb runs to
--out.

Exit code: 0 if all curves agree, 1 if they part or a run fails, 2 for unusable options.
"""

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_llep.offline.demo import finetuning_report
from megatron_llep.offline.demo.driver import check_steps, make_parser, run_demo, train
from megatron_llep.offline.demo.finetuning import RL, SFT, plan_rl, plan_sft
from megatron_llep.offline.launch.device import take_device


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit code."""
    parser = make_parser(__doc__, out="runs/finetune")
    parser.add_argument("--sft-steps", type=int, default=120, help="default: %(default)s")
    parser.add_argument("--rl-steps", type=int, default=40, help="default: %(default)s")
    args = parser.parse_args(argv)
    try:
        check_steps(args, "sft_steps", "rl_steps")
    except ValueError as error:
        parser.error(str(error))
    return run_demo(
        "finetune",
        lambda: run_stages(args.sft_steps, args.rl_steps, args.out),
        pages=[args.out / f"{stage.name}.html" for stage in (SFT, RL)],
    )


def run_stages(sft_steps: int, rl_steps: int, out: Path) -> bool:
    """Both stages, each both ways; whether all curves agree.

    Raises:
        RuntimeError: a run failed.
        ValueError: a log is incomplete.
    """
    device = take_device(SFT.world_size)
    for stage in (SFT, RL):  # of an earlier demo
        shutil.rmtree(out / stage.name, ignore_errors=True)
    agree = True
    for stage, plan, steps in ((SFT, plan_sft, sft_steps), (RL, plan_rl, rl_steps)):
        trained = train(plan(steps, out), device, stage.metrics)
        finetuning_report.write(stage, trained, out)
        agree &= trained.comparison.agree
    return agree


if __name__ == "__main__":
    sys.exit(main())
