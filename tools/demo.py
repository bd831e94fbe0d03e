"""Train a small MoE model with plain EP and with LLEP, and compare them.

    python tools/demo.py
    python tools/demo.py --tp 2 --pp 2 --ep 2
    python tools/demo.py --mixture-steps 5 --domain-steps 5 --out /tmp/demo

Both trainings start from the same seed: first on a mixture of prose and source code, then on the
code alone, where routing drifts out of balance. Writes summary.json, demo.png, report.html, logs,
and TensorBoard and (where wandb is installed) offline wandb runs to --out.

Exit code: 0 if the loss curves agree, 1 if they part or a run fails, 2 for unusable options.
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

import demo_figures
import demo_plan
from demo_plan import Layout

from megatron_llep.offline.compare.read import read_run
from megatron_llep.offline.compare.report import Report, write_report
from megatron_llep.offline.launch.device import choose_device
from megatron_llep.offline.launch.execute import execute
from megatron_llep.offline.launch.flags import Flags, parse_override
from megatron_llep.offline.launch.torchrun import count_gpus
from megatron_llep.offline.machine import describe_machine


def build_parser() -> argparse.ArgumentParser:
    """Command-line interface of this script."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--tp", type=int, default=1, help="tensor-parallel ranks (default: 1)")
    add("--pp", type=int, default=1, help="pipeline stages (default: 1)")
    add("--ep", type=int, default=2, help="expert-parallel ranks (default: 2)")
    add("--etp", type=int, default=1, help="tensor-parallel ranks of an expert (default: 1)")
    add("--mixture-steps", type=int, default=20, help="steps of the first phase")
    add("--domain-steps", type=int, default=40, help="steps of the second phase")
    add("--out", type=Path, default=Path("runs/demo"), help="default: runs/demo")
    add(
        "--set",
        action="append",
        default=[],
        metavar="FLAG=VALUE",
        help="replace one flag of configs/demo.yaml, such as --set hidden-size=64; may be repeated",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit code."""
    parser = build_parser()
    args = parser.parse_args(argv)
    layout = Layout(tp=args.tp, pp=args.pp, ep=args.ep, etp=args.etp)
    overrides: Flags = {}
    try:
        for option in ("mixture_steps", "domain_steps"):
            if getattr(args, option) < 2:
                flag = option.replace("_", "-")
                raise ValueError(f"--{flag} {getattr(args, option)}: give 2 or more")
        for text in args.set:
            overrides |= parse_override(text)
        demo_plan.check_layout(layout, overrides)
    except ValueError as error:
        parser.error(str(error))
    # Turned into an exception, so that the processes of a run end with the demo.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        return compare(layout, overrides, args.mixture_steps, args.domain_steps, args.out)
    except RuntimeError as error:
        print(f"\ndemo: FAILED. {error}", file=sys.stderr)
        return 1


def compare(
    layout: Layout, overrides: Flags, mixture_steps: int, domain_steps: int, out: Path
) -> int:
    """Train both ways, write everything to `out`, print the table.

    Returns:
        0 if the loss curves agree, else 1.

    Raises:
        RuntimeError: a run failed, or its log is incomplete.
    """
    started = time.monotonic()
    world_size = layout.world_size()
    device = choose_device(world_size, count_gpus(), len(os.sched_getaffinity(0)))
    print(f"{world_size} ranks, {layout}, on the {device.name.upper()}", flush=True)
    if device.note:
        print(f"note: {device.note}", flush=True)

    for folder in ("plain", "llep", "wandb", "logs"):  # of an earlier demo; the data stays
        shutil.rmtree(out / folder, ignore_errors=True)
    for line in demo_plan.prepare_data(out):
        print(f"data: {line}", flush=True)

    phases = demo_plan.plan_phases(mixture_steps, domain_steps)
    runs = demo_plan.plan_runs(phases, layout, overrides, out, world_size)
    watches = []
    for run in runs:
        print(f"\n$ {run.shell}", flush=True)
        watches.append(execute(run, device))

    logs, memory = {}, {}
    for kind, name in zip(demo_figures.KINDS, demo_figures.NAMES, strict=True):
        logs[kind] = read_run([run.tensorboard for run in runs if run.kind == kind], name)
        memory[kind] = [w for run, w in zip(runs, watches, strict=True) if run.kind == kind]
    comparison = demo_figures.compare_losses(logs, phases)
    figures = demo_figures.summarise(comparison, memory, phases)
    figures["layout"] = f"{layout}, {world_size} ranks on the {device.name.upper()}"
    figures["seconds"] = time.monotonic() - started
    parts = ", then ".join(
        f"steps {phase.first_step} to {phase.last_step} on {phase.name}" for phase in phases
    )
    report = Report(
        comparison=comparison,
        title=f"Plain expert parallelism and LLEP, same seed, same data ({figures['layout']})",
        intro="The same mixture-of-experts model, seed and data, trained twice: "
        f"{parts}. No auxiliary loss, no forced routing.",
        names=demo_figures.NAMES,
        rows=demo_figures.make_rows(comparison, figures),
        panels=demo_figures.make_panels(comparison, figures, phases),
        columns=2,
        subject="The loss curves",
        figures=figures,
        how_measured=demo_figures.explain(figures, device.name),
        machine={
            "machine": describe_machine(),
            "load average": f"{os.getloadavg()[0]:.1f} (last minute of the demo)",
            "megatron-core": version("megatron-core"),
        },
        commands=[f"# {run.title}\n{run.shell}\n" for run in runs],
    )
    write_report(
        report,
        summary=out / "summary.json",
        picture=out / "demo.png",
        page=out / "report.html",
        wandb_project=demo_plan.WANDB_PROJECT,
    )
    print(
        f"report: {out / 'report.html'}   ({time.monotonic() - started:.0f} s in all)", flush=True
    )
    return 0 if comparison.agree else 1


if __name__ == "__main__":
    sys.exit(main())
