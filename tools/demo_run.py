"""Run one training command: log to a file, show progress, watch the memory of every rank."""

import contextlib
import os
import queue
import re
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from demo_plan import Device, Run
from tqdm import tqdm

SILENCE_S = 300.0
# Lines of Megatron's log between which the memory is measured.
BEFORE_MODEL = "[after megatron is initialized]"
BEFORE_FIRST_STEP = "[after dataloaders are built]"

_STEP = re.compile(r"iteration +(\d+)/ *(\d+) \|")
_FIELDS = {
    "loss": re.compile(r"\blm loss: ([-+.\dEena]+)"),
    "ms": re.compile(r"elapsed time per iteration \(ms\): ([.\d]+)"),
    "before": re.compile(r"overload_factor_before: ([.\d]+)"),
    "after": re.compile(r"overload_factor_after: ([.\d]+)"),
}


class RunFailedError(RuntimeError):
    """A training command ended badly; the message holds the end of its log."""


@dataclass(frozen=True)
class StepLine:
    """One training step as Megatron's log has it; `values` holds loss, ms, before, after."""

    step: int
    values: dict[str, float]


def parse_step(line: str) -> StepLine | None:
    """Read a line of the training log; None if it is of another kind."""
    match = _STEP.search(line)
    if match is None:
        return None
    found = {name: pattern.search(line) for name, pattern in _FIELDS.items()}
    values = {name: float(hit[1]) for name, hit in found.items() if hit}
    return StepLine(step=int(match[1]), values=values)


@dataclass
class MemoryWatch:
    """Resident memory of each rank's process, in bytes, read from /proc of Linux.

    `libraries`: before the model was built. `start`: right before the first step. `peak`: the
    highest since then, by the kernel's own high-water mark.
    """

    launcher: int
    processes: dict[int, int] = field(default_factory=dict)
    libraries: dict[int, int] = field(default_factory=dict)
    start: dict[int, int] = field(default_factory=dict)
    peak: dict[int, int] = field(default_factory=dict)

    def mark_libraries(self) -> None:
        """Take the baseline: Python, libraries and process groups."""
        self.processes = dict(self._find_ranks())
        for rank, pid in self.processes.items():
            self.libraries[rank] = _read_status(pid, "VmRSS")

    def mark_start(self) -> None:
        """Forget the peak so far: building and loading are not training."""
        for rank, pid in self.processes.items():
            Path(f"/proc/{pid}/clear_refs").write_text("5")  # proc_pid_clear_refs(5): the peak
            self.start[rank] = _read_status(pid, "VmRSS")

    def update(self) -> None:
        """Read the high-water marks; they vanish with the processes."""
        if not self.start:
            return
        with contextlib.suppress(OSError):
            for rank, pid in self.processes.items():
                self.peak[rank] = _read_status(pid, "VmHWM")

    def _find_ranks(self) -> Iterator[tuple[int, int]]:
        """Rank and process id of the launcher's workers."""
        with contextlib.suppress(psutil.Error):
            for process in psutil.Process(self.launcher).children():
                with contextlib.suppress(psutil.Error):
                    rank = process.environ().get("RANK")
                    if rank is not None:
                        yield int(rank), process.pid


def _read_status(pid: int, name: str) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"process {pid} is gone")


def execute(run: Run, device: Device, silence_s: float = SILENCE_S) -> MemoryWatch:
    """Run the command to its end, with a progress bar.

    Args:
        run: what to run.
        device: where.
        silence_s: after so many seconds without output it is taken to hang.

    Returns:
        What its ranks' memory was; empty on a GPU.

    Raises:
        RunFailedError: it ended with an error or hung; it is stopped then.
    """
    run.log.parent.mkdir(parents=True, exist_ok=True)
    process = subprocess.Popen(
        run.command,
        env=device.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    watch = MemoryWatch(process.pid)
    try:
        with (
            run.log.open("w", encoding="utf-8") as log,
            tqdm(total=run.phase.steps, desc=f"{run.title:<20}", unit="step") as bar,
        ):
            bar.set_postfix_str("starting")
            for line in _read_lines(process, silence_s):
                if line is None:
                    watch.update()
                    continue
                log.write(line)
                if device.name == "cpu" and BEFORE_MODEL in line:
                    watch.mark_libraries()
                elif device.name == "cpu" and BEFORE_FIRST_STEP in line:
                    watch.mark_start()
                if step := parse_step(line):
                    watch.update()
                    bar.update(step.step - run.phase.first_step + 1 - bar.n)
                    bar.set_postfix_str(_describe(step.values))
        code = process.wait()
    except TimeoutError as error:
        raise RunFailedError(_tail(run, f"printed nothing for {silence_s:.0f} s")) from error
    finally:
        _stop(process)
    if code:
        raise RunFailedError(_tail(run, f"exit code {code}"))
    return watch


def _describe(values: Mapping[str, float]) -> str:
    parts = [f"loss {values['loss']:.3f}"] if "loss" in values else []
    if "ms" in values:
        parts.append(f"{values['ms'] / 1e3:.2f} s")
    if "before" in values:
        parts.append(f"imbalance {values['before']:.2f} -> {values['after']:.2f}")
    return ", ".join(parts)


def _read_lines(process: subprocess.Popen, silence_s: float) -> Iterator[str | None]:
    """Lines of the output as they come; None about twice a second while none comes."""
    lines: queue.Queue[str | None] = queue.Queue()

    def pump() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=pump, daemon=True).start()
    last = time.monotonic()
    while True:
        try:
            line = lines.get(timeout=0.5)
        except queue.Empty:
            if time.monotonic() - last > silence_s:
                raise TimeoutError from None
            yield None
            continue
        if line is None:
            return
        last = time.monotonic()
        yield line


def _stop(process: subprocess.Popen) -> None:
    """End the command and all it started."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, sign)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=10)


def _tail(run: Run, what: str, lines: int = 30) -> str:
    end = run.log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:]
    text = "\n".join(f"    {line}" for line in end)
    return f"{run.title}: {what}. The end of {run.log}:\n{text}\nFull log: {run.log}"
