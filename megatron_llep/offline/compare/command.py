"""The command line of the comparison: of two folders, or of runs that it starts itself."""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megatron_llep.offline.compare.comparison import Comparison, Metric, compare_runs
from megatron_llep.offline.compare.picture import standard_panels
from megatron_llep.offline.compare.read import read_run
from megatron_llep.offline.compare.report import Report, write_report
from megatron_llep.offline.compare.rows import standard_rows
from megatron_llep.offline.compare.run_log import RunLog
from megatron_llep.offline.compare.table import NO_CONTROL
from megatron_llep.offline.compare.verdict import Tolerance
from megatron_llep.offline.compare.wandb_out import wandb_is_on
from megatron_llep.offline.launch.device import take_device
from megatron_llep.offline.launch.execute import Run, RunFailedError, execute_all
from megatron_llep.offline.launch.flags import load_config, parse_extra, read_value, split_extra
from megatron_llep.offline.launch.torchrun import count_gpus
from megatron_llep.offline.launch.twins import CONTROLS, KINDS, plan_twins
from megatron_llep.offline.machine import describe_machine

DEFAULT_METRIC = "lm loss"
EARLY_HALF = 1e-3
"""Early tolerance of runs in bf16 and fp16; 3e-4 was seen in bf16 on a CPU."""


def build_parser(description: str) -> argparse.ArgumentParser:
    """The command-line interface."""
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("runs", nargs="*", type=Path, help="two folders of runs, the reference (plain EP) first")
    add("--names", nargs=2, metavar=("FIRST", "SECOND"), help="default: those of the folders")
    add(
        "--control",
        help="folder of the reference run again, in another order of summation or with another "
        f"seed; with --config: {', '.join(CONTROLS)} (default: order)",
    )
    add(
        "--metric",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME",
        help=f"what to judge, by the name it is logged under (default: {DEFAULT_METRIC!r})",
    )
    add(
        "--target",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="compare the time to this value; default: the level at which both runs end",
    )
    add(
        "--tolerance",
        action="append",
        default=[],
        metavar="[NAME=]PART",
        help=f"largest relative difference at any step (default: {Tolerance.overall:g})",
    )
    add(
        "--absolute",
        action="append",
        default=[],
        metavar="NAME=SIZE",
        help="judge NAME by its difference, not a part of its value, and its first steps no harder "
        "than the others: for accuracies and rewards",
    )
    add(
        "--early-tolerance",
        type=float,
        metavar="PART",
        help="largest relative difference in the first steps "
        f"(default: {Tolerance.early:g}; {EARLY_HALF:g} with --config and bf16 or "
        "fp16, whose rounding is coarser: give it for folders of such runs too)",
    )
    add(
        "--early-steps",
        type=int,
        default=Tolerance.early_steps,
        metavar="N",
        help="how many those are; 0: the runs share no seed (default: %(default)s)",
    )
    add(
        "--control-factor",
        type=float,
        metavar="K",
        help="how many times the control's difference is allowed (default: 10, or 3 where the "
        "control differs from the first steps on, as another seed does)",
    )
    add(
        "--smooth",
        action="append",
        default=[],
        metavar="[NAME=]N",
        help="each value counts as the mean of the last N (default: 1)",
    )
    add("--common-steps", action="store_true", help="judge the steps that all runs have")
    add("--out", type=Path, default=Path("runs/compare"), help="default: %(default)s")
    add("--wandb-project", help="log the comparison there, and the runs that --config starts")
    start = parser.add_argument_group("to start the runs", "Megatron's flags follow a --")
    start.add_argument("--config", type=Path, help="YAML file as in configs/")
    start.add_argument("--script", type=Path, help="default: that of the configuration")
    start.add_argument("--nproc", type=int, help="processes (default: what the layout needs)")
    return parser


def main(argv: Sequence[str], *, description: str, launcher: Path) -> int:
    """Compare; returns the exit code: 0 the runs agree, 1 they differ or one failed.

    Unusable options end the program with exit code 2.
    """
    own, extra = split_extra(argv)
    parser = build_parser(description)
    args = parser.parse_args(own)
    try:
        check_sources(args, extra)
        if args.config and args.early_tolerance is None and _is_half(args, extra):
            args.early_tolerance = EARLY_HALF
        metrics = read_metrics(args)
        runs = plan(args, extra, launcher) if args.config else []
    except ValueError as error:
        parser.error(str(error))
    try:
        if runs:
            execute_all(runs, take_device(runs[0].ranks))
    except RunFailedError as error:
        print(f"\ncompare: FAILED. {error}", file=sys.stderr)
        return 1
    try:
        sides, control = read_logs(args, runs)
        comparison = compare_runs(*sides, metrics, control=control, only_common=args.common_steps)
    except ValueError as error:
        parser.error(str(error))
    return finish(comparison, args, [run.shell for run in runs])


def _is_half(args: argparse.Namespace, extra: Sequence[str]) -> bool:
    """Whether the runs to start compute in 16 bits."""
    flags = load_config(args.config)["MODEL_ARGS"] | parse_extra(extra)
    return any(read_value(flags, flag, False) for flag in ("--bf16", "--fp16"))


def read_metrics(args: argparse.Namespace) -> list[Metric]:
    """The metrics that the options speak of, those to judge first.

    Raises:
        ValueError: an option is not of its form, or allows nothing.
    """
    targets = _pairs("--target", args.target)
    absolute = _pairs("--absolute", args.absolute)
    tolerances = _pairs("--tolerance", args.tolerance, bare=True)
    smooth = _pairs("--smooth", args.smooth, bare=True)
    judged = [*args.metric, *absolute, *(name for name in tolerances if name)]
    judged = list(dict.fromkeys(judged)) or [DEFAULT_METRIC]
    early = Tolerance.early if args.early_tolerance is None else args.early_tolerance
    base = Tolerance(
        early=early,
        early_steps=args.early_steps,
        overall=tolerances.get("", Tolerance.overall),
        factor=args.control_factor,
    )
    metrics = []
    for name in dict.fromkeys([*judged, *targets, *(each for each in smooth if each)]):
        if name in absolute:
            size = absolute[name]
            allowed = replace(base, absolute=True, early=size, early_steps=0, overall=size)
        else:
            allowed = replace(base, overall=tolerances.get(name, base.overall))
        metrics.append(
            Metric(
                name=name,
                tolerance=allowed if name in judged else None,
                target=targets.get(name),
                smooth=int(smooth.get(name, smooth.get("", 1))),
            )
        )
    return metrics


def _pairs(option: str, texts: Sequence[str], *, bare: bool = False) -> dict[str, float]:
    """Read NAME=NUMBER, and a NUMBER alone, if that is allowed, under the empty name.

    Raises:
        ValueError: another form.
    """
    pairs = {}
    for text in texts:
        name, found, number = text.rpartition("=")
        try:
            if bool(found) != bool(name) or not (name or bare):
                raise ValueError
            pairs[name] = float(number)
        except ValueError:
            form = "NUMBER or NAME=NUMBER" if bare else "NAME=NUMBER"
            raise ValueError(f"{option} {text!r}: write {form}, such as 'lm loss=0.5'") from None
    return pairs


def check_sources(args: argparse.Namespace, extra: Sequence[str]) -> None:
    """Check that there are either two runs or a configuration.

    Raises:
        ValueError: neither, both, or a control that does not fit.
    """
    if args.config:
        if args.runs:
            raise ValueError(f"{args.runs[0]}: give two folders or --config, not both")
        if (args.control or "order") not in CONTROLS:
            raise ValueError(f"--control {args.control}: with --config one of {CONTROLS}")
        if args.script and not args.script.is_file():
            raise ValueError(f"--script {args.script}: no such file")
        return
    if len(args.runs) != 2:
        raise ValueError(f"{len(args.runs)} folders: give two, or --config to start the runs")
    if extra:
        raise ValueError(f"{extra[0]} after --: flags are for runs that --config starts")


def plan(args: argparse.Namespace, extra: Sequence[str], launcher: Path) -> list[Run]:
    """The commands that --config asks for.

    Raises:
        ValueError: unusable flags, or folders with logs of an earlier comparison.
    """
    runs = plan_twins(
        args.config,
        parse_extra(extra),
        args.out,
        launcher=launcher,
        script=args.script,
        control=args.control or "order",
        nproc=args.nproc,
        gpu_count=count_gpus(),
        wandb_project=args.wandb_project if wandb_is_on() else None,
    )
    for run in runs:
        if run.tensorboard.parent.exists():
            raise ValueError(
                f"{run.tensorboard.parent} is there already: give another --out, or delete it"
            )
    return runs


def read_logs(
    args: argparse.Namespace, runs: Sequence[Run]
) -> tuple[tuple[RunLog, RunLog], RunLog | None]:
    """Both sides and the control, if there is one.

    Raises:
        ValueError: a log is missing or holds several runs.
    """
    if runs:
        logs = {
            run.kind: read_run(run.tensorboard, run.title) for run in runs if run.kind != "init"
        }
        names = args.names or (KINDS["plain"], KINDS["llep"])
        sides = [replace(logs[kind], name=name) for kind, name in zip(KINDS, names, strict=False)]
        return (sides[0], sides[1]), logs.get("control")
    names = args.names or [path.resolve().name for path in args.runs]
    if names[0] == names[1]:
        names = [str(path) for path in args.runs]
    sides = [read_run(path, name) for path, name in zip(args.runs, names, strict=True)]
    control = read_run(Path(args.control)) if args.control else None
    return (sides[0], sides[1]), control


def finish(comparison: Comparison, args: argparse.Namespace, commands: Sequence[str]) -> int:
    """Write and print everything; returns the exit code."""
    first, second = comparison.names
    out = args.out
    panels = standard_panels(comparison)
    note = NO_CONTROL if comparison.control is None else ""
    report = Report(
        comparison=comparison,
        title=f"{first} and {second}, side by side",
        intro=f"{comparison.reference.source} and {comparison.other.source}, compared on "
        f"{time.strftime('%Y-%m-%d')}. {note}",
        rows=standard_rows(comparison),
        panels=panels,
        columns=2 if len(panels) in (2, 4) else 3,
        machine={"compared on": describe_machine()},
        commands=commands,
    )
    write_report(report, out, ("compare.json", "compare.png", "compare.html"), args.wandb_project)
    if note:
        print(note)
    print(f"report: {out / 'compare.html'}", flush=True)
    return 0 if comparison.agree else 1
