"""Memory statistics of a machine without a GPU: the resident set of this process, in bytes.

They count the interpreter and the libraries too (several hundred MB), so compare two runs by
their difference. Freed tensors lower them only as far as the allocator gives pages back.
"""

import contextlib
from pathlib import Path
from typing import Any

import torch

_STATUS = Path("/proc/self/status")
_MEMORY = Path("/proc/meminfo")
_CLEAR_REFS = Path("/proc/self/clear_refs")
# What the kernel takes in clear_refs to set the peak back to the present (proc_pid_clear_refs(5)).
_RESET_PEAK = "5"


def _read_bytes(file: Path, field: str) -> int:
    for line in file.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{file} has no field {field}")


def get_resident_bytes(device: object = None) -> int:
    """Resident set of this process now, in bytes (``VmRSS``)."""
    return _read_bytes(_STATUS, "VmRSS")


def get_peak_resident_bytes(device: object = None) -> int:
    """Largest resident set since the start or the last reset, in bytes (``VmHWM``)."""
    return _read_bytes(_STATUS, "VmHWM")


def get_memory_of_machine(device: object = None) -> tuple[int, int]:
    """Bytes that are free, and all there are: of the machine, which every rank sees whole."""
    return _read_bytes(_MEMORY, "MemAvailable"), _read_bytes(_MEMORY, "MemTotal")


def reset_peak_resident_bytes(device: object = None) -> None:
    """Set the peak back to the present; where the kernel forbids it, the peak stays."""
    with contextlib.suppress(OSError):
        _CLEAR_REFS.write_text(_RESET_PEAK)


def get_memory_stats(device: object = None) -> dict[str, int]:
    """The keys of ``torch.cuda.memory_stats`` that Megatron logs; blocks are not counted (0)."""
    current, peak = get_resident_bytes(), get_peak_resident_bytes()
    return {
        "allocated_bytes.all.current": current,
        "allocated_bytes.all.peak": peak,
        "reserved_bytes.all.current": current,
        "reserved_bytes.all.peak": peak,
        "allocation.all.current": 0,
        "num_alloc_retries": 0,
        "num_ooms": 0,
    }


def install_memory_statistics() -> None:
    """Let ``torch.cuda``'s memory statistics report the resident set of this process."""
    replacements: dict[str, Any] = {
        "memory_stats": get_memory_stats,
        "mem_get_info": get_memory_of_machine,
        "reset_peak_memory_stats": reset_peak_resident_bytes,
        "reset_max_memory_allocated": reset_peak_resident_bytes,
    }
    for name in ("memory_allocated", "memory_reserved", "device_memory_used"):
        replacements[name] = get_resident_bytes
    for name in ("max_memory_allocated", "max_memory_reserved"):
        replacements[name] = get_peak_resident_bytes
    for name, function in replacements.items():
        setattr(torch.cuda, name, function)
        if hasattr(torch.cuda.memory, name):
            setattr(torch.cuda.memory, name, function)
