"""What all demos do: read a command line, train both ways, compare, and write a report."""

import argparse
import os
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from megatron_llep.offline.compare.comparison import Comparison, Metric, compare_runs
from megatron_llep.offline.compare.read import read_run
from megatron_llep.offline.compare.report import Report
from megatron_llep.offline.compare.rows import (
    PEAK_MEMORY,
    STEP_TIME,
    median_between,
    timed_steps,
)
from megatron_llep.offline.launch.device import Device
from megatron_llep.offline.launch.execute import Run, end_on_sigterm, execute_all
from megatron_llep.offline.launch.memory import MemoryWatch
from megatron_llep.offline.launch.twins import KINDS
from megatron_llep.offline.machine import describe_machine

ROOT = Path(__file__).resolve().parents[3]
"""The checkout, whose tools and configurations the demos run."""
LAUNCHER = ROOT / "tools" / "launch.py"
SIDES = ("plain", "llep")
MEMORY = {
    "cpu": "Highest resident size (VmHWM) of a rank's process from its first step on, less what it "
    "held before the model was built (Python, libraries, process groups): weights, gradients, "
    "optimizer, activations, lent experts. Of the worst rank.",
    "gpu": "torch.cuda.max_memory_allocated of the worst rank.",
}
"""By the name of the device: how peak memory was measured."""


def make_parser(description: str | None, out: str) -> argparse.ArgumentParser:
    """A command line with --out."""
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--out", type=Path, default=Path(out), help="default: %(default)s")
    return parser


def check_steps(args: Namespace, *options: str) -> None:
    """Check options that are numbers of steps.

    Raises:
        ValueError: too few of them.
    """
    for option in options:
        steps = getattr(args, option)
        if steps < 2:
            raise ValueError(f"--{option.replace('_', '-')} {steps}: give 2 or more")


def run_demo(name: str, work: Callable[[], bool], pages: Sequence[Path]) -> int:
    """Do the work, and say where its pages are; the exit code.

    Args:
        name: of the demo.
        work: says whether all curves agree; RuntimeError and ValueError: it failed.
        pages: what it writes.
    """
    end_on_sigterm()
    started = time.monotonic()
    try:
        agree = work()
    except (RuntimeError, ValueError) as error:
        print(f"\n{name}: FAILED. {error}", file=sys.stderr)
        return 1
    took = f"{time.monotonic() - started:.0f} s in all"
    print(f"report: {' and '.join(map(str, pages))}   ({took})", flush=True)
    return 0 if agree else 1


def run_tool(name: str, *options: str) -> str:
    """Run one of `tools/`; what it printed.

    Raises:
        RuntimeError: it failed; the message has its output.
    """
    command = [sys.executable, str(ROOT / "tools" / name), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return done.stdout


@dataclass(frozen=True, kw_only=True)
class Trained:
    """Runs that ended, and what was found about them; pairs are plain EP and LLEP."""

    runs: Sequence[Run]
    comparison: Comparison
    watches: dict[str, list[MemoryWatch]]
    """By kind of run, of each of its phases."""
    device: Device

    def peak_mib(self) -> tuple[float, float]:
        """Of the worst rank and phase; on GPUs what the run itself logged."""
        plain, llep = (
            find_worst([watch.worst_peak for watch in self.watches[kind]])
            or float(log.curve(PEAK_MEMORY).values.max()) / 2**20
            for kind, log in zip(SIDES, self.comparison.sides, strict=True)
        )
        return plain, llep

    def step_seconds(self, timed: tuple[int, int] | None = None) -> tuple[float, float]:
        """Median of the steps from first to last; default: of all but those that warm up."""
        plain, llep = (log.curve(STEP_TIME) for log in self.comparison.sides)
        timed = timed or timed_steps(plain)
        return median_between(plain, timed), median_between(llep, timed)


def find_worst(peaks: Sequence[float | None]) -> float | None:
    """MiB of the largest number of bytes; None where none is known."""
    known = [peak for peak in peaks if peak is not None]
    return max(known) / 2**20 if known else None


def train(runs: Sequence[Run], device: Device, metrics: Sequence[Metric]) -> Trained:
    """Run all, one after another, and compare what they logged.

    Raises:
        RuntimeError: a run failed.
        ValueError: a log lacks a metric, or steps of the first one.
    """
    found = execute_all(runs, device)
    watches: dict[str, list[MemoryWatch]] = {}
    for run, watch in zip(runs, found, strict=True):
        watches.setdefault(run.kind, []).append(watch)
    comparison = compare_logs(runs, metrics)
    return Trained(runs=runs, comparison=comparison, watches=watches, device=device)


def compare_logs(runs: Sequence[Run], metrics: Sequence[Metric]) -> Comparison:
    """Hold LLEP against plain EP, with a control if there is one.

    Raises:
        ValueError: a log lacks a metric, or steps of the first one.
    """
    logs = {
        kind: read_run([run.tensorboard for run in runs if run.kind == kind], name)
        for kind, name in KINDS.items()
        if any(run.kind == kind for run in runs)
    }
    last = max(run.first_step + run.steps - 1 for run in runs)
    for log in logs.values():
        steps = log.curve(metrics[0].name).steps
        if not np.array_equal(steps, np.arange(1, last + 1)):
            raise ValueError(f"the log of {log.name} has {steps.size} of {last} steps")
    return compare_runs(logs["plain"], logs["llep"], metrics, control=logs.get("control"))


def make_report(trained: Trained, **said: Any) -> Report:
    """The report of a demo, with machine and commands; `said` are its other fields."""
    return Report(
        comparison=trained.comparison,
        machine={
            "machine": describe_machine(),
            "load average": f"{os.getloadavg()[0]:.1f} (the last minute)",
            "megatron-core": version("megatron-core"),
        },
        commands=[f"# {run.title}\n{run.shell}\n" for run in trained.runs],
        **said,
    )
