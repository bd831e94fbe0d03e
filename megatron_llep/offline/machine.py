"""The machine at hand, for results that depend on it."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def describe_machine() -> str:
    """Processor, cores, memory, GPUs if any, and the versions of Python and torch, in one line."""
    import torch

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    parts = [_find_processor(), f"{len(os.sched_getaffinity(0))} cores", f"{memory:.0f} GiB"]
    if torch.cuda.is_available():
        parts.append(f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}")
    else:
        parts.append("no GPU")
    parts += [f"Python {platform.python_version()}", f"torch {torch.__version__}"]
    return ", ".join(parts)


def read_versions() -> dict[str, str]:
    """Of what results depend on: Python, torch and what is below it, Megatron, numpy."""
    import torch

    versions = {"python": platform.python_version(), "torch": torch.__version__}
    if torch.version.cuda:
        versions["cuda"] = torch.version.cuda
    if torch.cuda.is_available():
        versions["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    for name in ("megatron-core", "transformer_engine", "triton", "numpy"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def list_gpus() -> list[dict[str, object]]:
    """Name, memory in GiB and compute capability of each."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [
        {
            "name": gpu.name,
            "gib": round(gpu.total_memory / 2**30, 1),
            "capability": f"{gpu.major}.{gpu.minor}",
        }
        for gpu in map(torch.cuda.get_device_properties, range(count))
    ]


def _find_processor() -> str:
    """The processor's name as Linux gives it, else what Python knows."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
