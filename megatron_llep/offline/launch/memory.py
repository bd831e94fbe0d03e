"""Resident memory of each rank's process, read from outside while it trains."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

# Lines of Megatron's log between which the memory is measured.
BEFORE_MODEL = "[after megatron is initialized]"
BEFORE_FIRST_STEP = "[after dataloaders are built]"


@dataclass
class MemoryWatch:
    """Bytes of each rank, from /proc of Linux; all empty on a GPU.

    `libraries`: before the model was built. `start`: right before the first step. `peak`: the
    highest since then, by the kernel's own high-water mark.
    """

    launcher: int
    processes: dict[int, int] = field(default_factory=dict)
    libraries: dict[int, int] = field(default_factory=dict)
    start: dict[int, int] = field(default_factory=dict)
    peak: dict[int, int] = field(default_factory=dict)

    def read_line(self, line: str) -> None:
        """Take the marks that this line of Megatron's log stands for."""
        if BEFORE_MODEL in line:
            self._mark_libraries()
        elif BEFORE_FIRST_STEP in line:
            self._mark_start()

    def update(self) -> None:
        """Read the high-water marks; they vanish with the processes."""
        if not self.start:
            return
        with contextlib.suppress(OSError):
            for rank, pid in self.processes.items():
                self.peak[rank] = _read_status(pid, "VmHWM")

    @property
    def worst_peak(self) -> float | None:
        """Bytes of the worst rank at its peak, above Python and its libraries; None on a GPU."""
        above = [self.peak[rank] - self.libraries[rank] for rank in self.peak]
        return float(max(above)) if above else None

    @property
    def worst_of_steps(self) -> float | None:
        """The same above what the rank held right before its first step."""
        above = [self.peak[rank] - self.start[rank] for rank in self.peak]
        return float(max(above)) if above else None

    def _mark_libraries(self) -> None:
        """Take the baseline: Python, libraries and process groups."""
        self.processes = dict(self._find_ranks())
        for rank, pid in self.processes.items():
            self.libraries[rank] = _read_status(pid, "VmRSS")

    def _mark_start(self) -> None:
        """Forget the peak so far: building and loading are not training."""
        for rank, pid in self.processes.items():
            Path(f"/proc/{pid}/clear_refs").write_text("5")  # proc_pid_clear_refs(5): the peak
            self.start[rank] = _read_status(pid, "VmRSS")

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
