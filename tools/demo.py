"""Train a small MoE model with plain EP and with LLEP, and compare them.

    python tools/demo.py
    python tools/demo.py --tp 2 --pp 2 --ep 2
    python tools/demo.py --mixture-steps 5 --domain-steps 5 --out /tmp/demo

Both trainings start from the same seed: first on a mixture of prose and source code, then on the
code alone, where routing drifts out of balance. Writes summary.json, demo.png, report.html, logs,
and TensorBoard and (where wandb is installed) offline wandb runs to --out.

Exit code: 0 if the loss curves agree, 1 if they part or a run fails, 2 for unusable options.
"""

import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from megatron_llep.offline.demo import pretraining_report
from megatron_llep.offline.demo.driver import check_steps, make_parser, run_demo, train
from megatron_llep.offline.demo.pretraining import (
    METRICS,
    Layout,
    Phase,
    check_layout,
    plan_phases,
    plan_runs,
    prepare_data,
)
from megatron_llep.offline.launch.device import take_device
from megatron_llep.offline.launch.flags import Flags, parse_override


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit code."""
    parser = make_parser(__doc__, out="runs/demo")
    add = parser.add_argument
    add("--tp", type=int, default=1, help="tensor-parallel ranks (default: 1)")
    add("--pp", type=int, default=1, help="pipeline stages (default: 1)")
    add("--ep", type=int, default=2, help="expert-parallel ranks (default: 2)")
    add("--etp", type=int, default=1, help="tensor-parallel ranks of an expert (default: 1)")
    add("--mixture-steps", type=int, default=20, help="steps of the first phase")
    add("--domain-steps", type=int, default=40, help="steps of the second phase")
    add(
        "--set",
        action="append",
        default=[],
        metavar="FLAG=VALUE",
        help="replace one flag of configs/demo.yaml, such as --set hidden-size=64; may be repeated",
    )
    args = parser.parse_args(argv)
    layout = Layout(tp=args.tp, pp=args.pp, ep=args.ep, etp=args.etp)
    overrides: Flags = {}
    try:
        check_steps(args, "mixture_steps", "domain_steps")
        for text in args.set:
            overrides |= parse_override(text)
        check_layout(layout, overrides)
    except ValueError as error:
        parser.error(str(error))
    phases = plan_phases(args.mixture_steps, args.domain_steps)
    return run_demo(
        "demo",
        lambda: compare(phases, layout, overrides, args.out),
        pages=[args.out / "report.html"],
    )


def compare(phases: Sequence[Phase], layout: Layout, overrides: Flags, out: Path) -> bool:
    """Train both ways, write everything to `out`, print the table.

    Returns:
        Whether the loss curves agree.

    Raises:
        RuntimeError: a run failed.
        ValueError: a log is incomplete.
    """
    started = time.monotonic()
    ranks = layout.world_size()
    device = take_device(ranks, str(layout))
    for folder in ("plain", "llep", "wandb", "logs"):  # of an earlier demo; the data stays
        shutil.rmtree(out / folder, ignore_errors=True)
    for line in prepare_data(out):
        print(f"data: {line}", flush=True)
    trained = train(plan_runs(phases, layout, overrides, out), device, METRICS)
    world = f"{layout}, {ranks} ranks on the {device.name.upper()}"
    pretraining_report.write(trained, phases, world, time.monotonic() - started, out)
    return trained.comparison.agree


if __name__ == "__main__":
    sys.exit(main())
