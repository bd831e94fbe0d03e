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

import argparse
import os
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import finetune_figures
import finetune_plan
from finetune_plan import RL, SFT, Stage

from megatron_llep.offline.compare.comparison import compare_runs
from megatron_llep.offline.compare.read import read_run
from megatron_llep.offline.compare.report import HOW_MEASURED, Report, write_report
from megatron_llep.offline.launch.device import Device, choose_device
from megatron_llep.offline.launch.execute import Run, execute
from megatron_llep.offline.launch.torchrun import count_gpus
from megatron_llep.offline.launch.twins import KINDS
from megatron_llep.offline.machine import describe_machine


def build_parser() -> argparse.ArgumentParser:
    """Command-line interface of this script."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--sft-steps", type=int, default=120, help="default: %(default)s")
    add("--rl-steps", type=int, default=40, help="default: %(default)s")
    add("--out", type=Path, default=Path("runs/finetune"), help="default: %(default)s")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit code."""
    parser = build_parser()
    args = parser.parse_args(argv)
    for option in ("sft_steps", "rl_steps"):
        if getattr(args, option) < 2:
            flag = option.replace("_", "-")
            parser.error(f"--{flag} {getattr(args, option)}: give 2 or more")
    # Turned into an exception, so that the processes of a run end with the demo.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    started = time.monotonic()
    try:
        agree = run_all(args.sft_steps, args.rl_steps, args.out)
    except RuntimeError as error:
        print(f"\nfinetune: FAILED. {error}", file=sys.stderr)
        return 1
    pages = " and ".join(str(args.out / f"{stage.name}.html") for stage in (SFT, RL))
    print(f"\nreports: {pages}   ({time.monotonic() - started:.0f} s in all)")
    return 0 if agree else 1


def run_all(sft_steps: int, rl_steps: int, out: Path) -> bool:
    """Both stages, each both ways.

    Returns:
        Whether all curves agree.

    Raises:
        RuntimeError: a run failed, or its log is incomplete.
    """
    gpu_count = count_gpus()
    device = choose_device(SFT.world_size, gpu_count, len(os.sched_getaffinity(0)))
    print(f"{SFT.world_size} ranks on the {device.name.upper()}", flush=True)
    for stage in (SFT, RL):  # of an earlier demo
        shutil.rmtree(out / stage.name, ignore_errors=True)
    data = finetune_plan.prepare_data(out / "data")
    runs = finetune_plan.plan_sft(data, sft_steps, out, gpu_count)
    agree = run_stage(SFT, runs, device, out)
    runs = finetune_plan.plan_rl(rl_steps, out, gpu_count)
    return run_stage(RL, runs, device, out) and agree


def run_stage(stage: Stage, runs: Sequence[Run], device: Device, out: Path) -> bool:
    """Run them, print the comparison and write it.

    Returns:
        Whether the curves agree.

    Raises:
        RuntimeError: a run failed, or its log is incomplete.
    """
    watches = {}
    for run in runs:
        print(f"\n$ {run.shell}", flush=True)
        watches[run.kind] = execute(run, device)
    try:
        logs = {run.kind: read_run(run.tensorboard, KINDS[run.kind]) for run in runs[-3:]}
        comparison = compare_runs(
            logs["plain"],
            logs["llep"],
            finetune_figures.METRICS[stage.name],
            control=logs["control"],
        )
        rows = finetune_figures.make_rows(stage, comparison, watches)
    except ValueError as error:
        raise RuntimeError(f"the logs are incomplete: {error}") from error
    goals = finetune_figures.find_goals(stage, comparison)
    report = Report(
        comparison=comparison,
        title=f"{stage.title}: plain expert parallelism and LLEP, same start, same data",
        intro=f"A small mixture-of-experts model, {stage.world_size} ranks on the "
        f"{device.name.upper()}, no auxiliary loss. {goals.describe()}",
        names=finetune_figures.NAMES,
        rows=rows,
        panels=finetune_figures.make_panels(stage, comparison),
        figures={"goals": vars(goals)},
        how_measured=HOW_MEASURED | finetune_figures.explain(stage, device.name),
        machine={
            "machine": describe_machine(),
            "load average": f"{os.getloadavg()[0]:.1f} (last minute)",
            "megatron-core": version("megatron-core"),
        },
        commands=[f"# {run.title}\n{run.shell}\n" for run in runs],
    )
    write_report(
        report,
        summary=out / f"{stage.name}.json",
        picture=out / f"{stage.name}.png",
        page=out / f"{stage.name}.html",
        wandb_project=finetune_plan.WANDB_PROJECT,
    )
    print(goals.describe(), flush=True)
    return comparison.agree


if __name__ == "__main__":
    sys.exit(main())
