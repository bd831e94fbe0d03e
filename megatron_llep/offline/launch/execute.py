"""Run one training command: log to a file, show progress, watch the memory of every rank."""

import contextlib
import os
import queue
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from megatron_llep.offline.launch.device import Device
from megatron_llep.offline.launch.memory import MemoryWatch

SILENCE_S = 300.0
SHOWN: Mapping[str, str] = {"loss": "lm loss"}
"""What the progress bar says of a step: label -> name on Megatron's console line."""

_STEP = re.compile(r"iteration +(\d+)/ *(\d+) \|")
_NUMBER = r"([-+.\dEeinfa]+)"
_MS = "elapsed time per iteration (ms)"
_BEFORE, _AFTER = "overload_factor_before", "overload_factor_after"


class RunFailedError(RuntimeError):
    """A training command ended badly; the message holds the end of its log."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training command of so many `ranks`.

    `kind` is the side of a comparison that it belongs to, `title` what people are told it is.
    Its steps are `first_step` to `first_step + steps - 1` as Megatron counts them.
    """

    kind: str
    title: str
    command: list[str]
    ranks: int
    log: Path
    tensorboard: Path
    steps: int
    first_step: int = 1
    shown: Mapping[str, str] = field(default_factory=lambda: SHOWN)

    @property
    def shell(self) -> str:
        """The command as it can be typed in the present folder."""
        return shlex.join(self.command).replace(f"{Path.cwd()}/", "")


def end_on_sigterm() -> None:
    """Turn SIGTERM into an exception, so that the processes of a run end with this one."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def parse_step(line: str) -> tuple[int, dict[str, float]] | None:
    """Read a line of the training log: step and name -> number; None if it is of another kind."""
    match = _STEP.search(line)
    if match is None:
        return None
    values = {}
    for part in line[match.end() :].split("|"):
        name, found, value = part.strip().rpartition(":")
        if found and re.fullmatch(_NUMBER, value.strip()):
            with contextlib.suppress(ValueError):
                values[name.strip()] = float(value)
    return int(match[1]), values


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
            tqdm(total=run.steps, desc=f"{run.title:<20}", unit="step") as bar,
        ):
            bar.set_postfix_str("starting")
            for line in _read_lines(process, silence_s):
                if line is None:
                    watch.update()
                    continue
                log.write(line)
                if device.name == "cpu":
                    watch.read_line(line)
                if found := parse_step(line):
                    step, values = found
                    watch.update()
                    bar.update(step - run.first_step + 1 - bar.n)
                    bar.set_postfix_str(_describe(run, values))
        code = process.wait()
    except TimeoutError as error:
        raise RunFailedError(_tail(run, f"printed nothing for {silence_s:.0f} s")) from error
    finally:
        _stop(process)
    if code:
        raise RunFailedError(_tail(run, f"exit code {code}"))
    return watch


def execute_all(runs: Sequence[Run], device: Device) -> list[MemoryWatch]:
    """Run the commands one after another, saying each; what `execute` returns of each.

    Raises:
        RunFailedError: one ended badly; the later ones do not run.
    """
    watches = []
    for run in runs:
        print(f"\n$ {run.shell}", flush=True)
        watches.append(execute(run, device))
    return watches


def _describe(run: Run, values: Mapping[str, float]) -> str:
    parts = [f"{label} {values[name]:.3f}" for label, name in run.shown.items() if name in values]
    if _MS in values:
        parts.append(f"{values[_MS] / 1e3:.2f} s")
    if _BEFORE in values and _AFTER in values:
        parts.append(f"imbalance {values[_BEFORE]:.2f} -> {values[_AFTER]:.2f}")
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
