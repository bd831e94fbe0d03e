"""Streams, events and device queries of a machine without a GPU.

Work on a CPU is done when the call returns. So there is one stream, every stream is that one,
and waiting for it means nothing.
"""

import contextlib
import os
import platform
import time
from types import SimpleNamespace
from typing import Any

import torch

CPU = torch.device("cpu")


class CpuStream:
    """The one stream there is. All instances compare equal; waiting returns at once."""

    device = CPU
    device_index = 0
    cuda_stream = 0
    priority = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Take, and ignore, device and priority."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CpuStream)

    def __hash__(self) -> int:
        return hash(CpuStream)

    def __enter__(self) -> "CpuStream":
        return self

    def __exit__(self, *exc_info: object) -> None:
        return None

    @staticmethod
    def priority_range() -> tuple[int, int]:
        """Lowest and highest priority: there is only one."""
        return 0, 0

    def wait_stream(self, stream: object) -> None:
        """Return at once."""

    def wait_event(self, event: object) -> None:
        """Return at once."""

    def synchronize(self) -> None:
        """Return at once."""

    def query(self) -> bool:
        """All work is done."""
        return True

    def record_event(self, event: "CpuEvent | None" = None) -> "CpuEvent":
        """Record ``event``, or a new one, and return it."""
        event = event or CpuEvent()
        event.record(self)
        return event


class CpuEvent:
    """A point in time on the one stream."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Take, and ignore, enable_timing, blocking and interprocess."""
        self._seconds: float | None = None

    def record(self, stream: object = None) -> None:
        """Remember the time of the call."""
        self._seconds = time.perf_counter()

    def elapsed_time(self, end_event: "CpuEvent") -> float:
        """Milliseconds from this event to ``end_event``.

        Raises:
            RuntimeError: one of the two was not recorded.
        """
        if self._seconds is None or end_event._seconds is None:
            raise RuntimeError("Both events must be recorded before the time between them is read.")
        return (end_event._seconds - self._seconds) * 1e3

    def wait(self, stream: object = None) -> None:
        """Return at once."""

    def synchronize(self) -> None:
        """Return at once."""

    def query(self) -> bool:
        """All work is done."""
        return True


def _get_device_properties(device: object = None) -> SimpleNamespace:
    page_bytes = os.sysconf("SC_PAGE_SIZE")
    return SimpleNamespace(
        name=platform.processor() or platform.machine(),
        major=0,
        minor=0,
        total_memory=page_bytes * os.sysconf("SC_PHYS_PAGES"),
        multi_processor_count=os.cpu_count() or 1,
    )


def _do_nothing(*args: Any, **kwargs: Any) -> None:
    return None


def install_streams() -> None:
    """Give streams, events and device queries of ``torch.cuda`` their CPU meaning.

    ``current_device()`` is the device ``cpu``, because Megatron passes it as ``device=``.
    There is one device, of compute capability 0.0: no feature of any GPU generation.
    """
    cuda: Any = torch.cuda
    the_stream = CpuStream()
    cuda.Stream = CpuStream
    cuda.Event = CpuEvent
    cuda.current_stream = cuda.default_stream = lambda device=None: the_stream
    cuda.stream = lambda stream: contextlib.nullcontext(stream)
    cuda.device = lambda device: contextlib.nullcontext(device)
    cuda.current_device = lambda: CPU
    cuda.device_count = lambda: 1
    cuda.get_device_properties = _get_device_properties
    cuda.get_device_capability = lambda device=None: (0, 0)
    cuda.get_device_name = lambda device=None: _get_device_properties().name
    cuda.is_current_stream_capturing = lambda: False
    for name in ("synchronize", "set_device", "set_stream", "empty_cache", "ipc_collect"):
        setattr(cuda, name, _do_nothing)
    for name in ("range_push", "range_pop"):
        setattr(cuda.nvtx, name, _do_nothing)
