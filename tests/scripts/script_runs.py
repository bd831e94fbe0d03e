"""Start a training script as a user does, and read what it logs."""

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import psutil
from warm_start import run_warm

from megatron_llep.offline.launch.flags import format_flags, load_config, parse_extra
from support.ports import find_free_port

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "pretrain" / "pretrain_gpt.py"
TINY = ROOT / "configs" / "tiny.yaml"
TAIL = 6000
SETTINGS = {"OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", "PYTHONUNBUFFERED": "1"}

# Two layers of width 32, small enough that a run's time is that of its start; the routing of a
# few hundred tokens is uneven enough to lend in every step.
SMALL = shlex.split("""
    --num-layers 2 --hidden-size 32 --ffn-hidden-size 64 --moe-ffn-hidden-size 64 --kv-channels 8
    --seq-length 32 --max-position-embeddings 32 --micro-batch-size 2 --global-batch-size 8
    --lr-warmup-fraction 0 --lr-decay-style constant
""")
EAGER = ["--moe-llep-imbalance-threshold", "1.0"]


@dataclass(frozen=True)
class Log:
    """What a run that ended well has printed."""

    text: str

    def read(self, name: str) -> dict[int, float]:
        """Iteration -> value of a number on Megatron's lines, such as `lm loss`."""
        line = re.compile(rf"iteration +(\d+)/.*\| {re.escape(name)}: (\S+) \|")
        return {int(found[1]): float(found[2]) for found in line.finditer(self.text)}

    @property
    def losses(self) -> dict[int, float]:
        return self.read("lm loss")


def run_tiny(flags: Sequence[object], *, config: Path = TINY, **options: Any) -> Log:
    """Run configs/tiny.yaml, or another, made smaller; otherwise as `run_config`."""
    return run_config(config, [*SMALL, *flags], **options)


def run_config(
    config: Path,
    flags: Sequence[object],
    *,
    llep: bool,
    script: Path = SCRIPT,
    layout: Mapping[str, object] | None = None,
    processes: int | None = None,
    timeout: float = 200.0,
    as_user: bool = False,
) -> Log:
    """Run a configuration.

    Args:
        config: of configs/.
        flags: Megatron's, beyond the configuration's.
        llep: whether with LLEP, which then lends whenever the ranks' loads differ at all.
        script: which to start.
        layout: flag without dashes -> value, as for --set.
        processes: default: as many as the layout needs.
        timeout: seconds after which the run and all its processes are ended.
        as_user: through tools/launch.py and torchrun, which takes some 15 s more; else the script
            runs in forked ranks.
    """
    options = [str(config), "--script", str(script)]
    options += [] if llep else ["--no-llep"]
    options += [] if processes is None else ["--nproc", str(processes)]
    for name, value in (layout or {}).items():
        options += ["--set", f"--{name}={str(value).lower()}"]
    options += ["--", *(EAGER if llep else []), *map(str, flags)]
    if as_user:
        return run_command([sys.executable, str(ROOT / "tools" / "launch.py"), *options], timeout)
    return Log(run_warm(options, SETTINGS, port=find_free_port(), timeout=timeout))


def run_command(command: Sequence[str], timeout: float) -> Log:
    """Run a command that ends well within so many seconds."""
    with _start(command, {}) as started:
        text, code = started.finish(timeout)
    assert code == 0, f"ended with {code}: {' '.join(command)}\n{text[-TAIL:]}"
    return Log(text)


def run_ranks_by_hand(flags_of_rank: Sequence[Sequence[str]], timeout: float) -> list[str]:
    """Start one process a rank of a world of two, each with flags of its own, without torchrun.

    Returns:
        What each printed, with its exit code as the last line.
    """
    with contextlib.ExitStack() as stack:
        port = str(find_free_port())
        started = []
        for rank, flags in enumerate(flags_of_rank):
            environment = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }
            command = [sys.executable, str(SCRIPT), *flags]
            started.append(stack.enter_context(_start(command, environment)))
        finished = [each.finish(timeout) for each in started]
    return [f"{text}\nexit code {code}" for text, code in finished]


def tiny_flags(*flags: str, without: Sequence[str] = ()) -> list[str]:
    """The flags of configs/tiny.yaml, made smaller, with LLEP, then these."""
    return config_flags(TINY, *SMALL, *flags, without=without)


def config_flags(config: Path, *flags: str, without: Sequence[str] = ()) -> list[str]:
    """The flags of a configuration, with LLEP, then these."""
    sections = load_config(config)
    merged = {name: value for part in sections.values() for name, value in part.items()}
    merged |= parse_extra(flags)
    return format_flags({k: v for k, v in merged.items() if k not in without})


@dataclass(frozen=True)
class _Started:
    """A running command and what it prints; a file, as nobody reads a pipe meanwhile."""

    process: subprocess.Popen[bytes]
    output: IO[bytes]

    def finish(self, timeout: float) -> tuple[str, int]:
        """Wait for the end; what was printed and the exit code."""
        try:
            code = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"no end after {timeout} s:\n{self._read()[-TAIL:]}") from None
        return self._read(), code

    def kill(self) -> None:
        """Kill it and its descendants: torchrun's workers have sessions of their own."""
        if self.process.poll() is not None:
            return
        children = psutil.Process(self.process.pid).children(recursive=True)
        for pid in (self.process.pid, *(child.pid for child in children)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def _read(self) -> str:
        self.output.seek(0)
        return self.output.read().decode(errors="replace")


@contextlib.contextmanager
def _start(command: Sequence[str], environment: Mapping[str, str]) -> Iterator[_Started]:
    """Start a command; whatever is left of it at the end is killed."""
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **SETTINGS, **environment},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        started = _Started(process, output)
        try:
            yield started
        finally:
            started.kill()
