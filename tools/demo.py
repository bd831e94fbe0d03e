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
import json
import os
import platform
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import demo_measure
import demo_plan
import demo_plot
import demo_report
import demo_run
import launch
from demo_plan import Device, Layout


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
    overrides: launch.Flags = {}
    try:
        for option in ("mixture_steps", "domain_steps"):
            if getattr(args, option) < 2:
                flag = option.replace("_", "-")
                raise ValueError(f"--{flag} {getattr(args, option)}: give 2 or more")
        for text in args.set:
            overrides |= launch.parse_override(text)
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
    layout: Layout, overrides: launch.Flags, mixture_steps: int, domain_steps: int, out: Path
) -> int:
    """Train both ways, write everything to `out`, print the table.

    Returns:
        0 if the loss curves agree, else 1.

    Raises:
        RuntimeError: a run failed, or its log is incomplete.
    """
    started = time.monotonic()
    world_size = layout.world_size()
    device = demo_plan.choose_device(world_size, launch.count_gpus(), len(os.sched_getaffinity(0)))
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
        watches.append(demo_run.execute(run, device))

    by_kind = {
        kind: demo_measure.collect_curves(
            [(run, watch) for run, watch in zip(runs, watches, strict=True) if run.kind == kind]
        )
        for kind in ("plain", "llep")
    }
    summary = demo_measure.summarise(by_kind["plain"], by_kind["llep"], phases)
    summary["layout"] = f"{layout}, {world_size} ranks on the {device.name.upper()}"
    summary["machine"] = describe_machine(device)
    summary["how_measured"] = demo_report.explain(summary, device)
    summary["seconds"] = time.monotonic() - started

    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    demo_plot.draw(by_kind["plain"], by_kind["llep"], phases, summary, out / "demo.png")
    demo_report.write_report(summary, runs, out / "demo.png", out / "report.html")

    print(f"\n{demo_report.format_table(demo_report.make_rows(summary))}\n")
    print(demo_report.format_verdict(summary))
    print(f"report: {out / 'report.html'}   ({summary['seconds']:.0f} s in all)", flush=True)
    return 0 if demo_measure.losses_agree(summary) else 1


def describe_machine(device: Device) -> dict[str, Any]:
    """What the figures were measured on."""
    import torch

    machine: dict[str, Any] = {
        "CPU": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "load average": f"{os.getloadavg()[0]:.1f} (last minute of the demo)",
        "torch": torch.__version__,
        "megatron-core": version("megatron-core"),
        "Python": platform.python_version(),
    }
    if device.name == "gpu":
        machine["GPU"] = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    return machine


def _cpu_name() -> str:
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


if __name__ == "__main__":
    sys.exit(main())
