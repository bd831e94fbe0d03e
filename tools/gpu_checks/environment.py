"""Which machine this is, which versions are installed, and what is missing."""

import importlib.metadata
import importlib.util
import platform

import torch

MISSING = {
    "megatron-core": (
        "megatron.core",
        "no correctness section, no GPU tests (install the wheel, or put it on PYTHONPATH)",
    ),
    "transformer_engine": (
        "transformer_engine",
        "the critical path runs on torch's grouped_mm alone, Megatron's local layers are compared",
    ),
    "triton": ("triton", "no Triton kernels; megatron-core cannot be imported"),
    "pytest": ("pytest", "the GPU tests cannot run"),
}
"""Package -> its module, and what is lost without it."""


def is_installed(module: str) -> bool:
    """Whether a module can be found, without importing it (its parents are)."""
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:
        return False


def list_missing() -> dict[str, str]:
    """Packages that are not there -> what is lost without them."""
    return {name: loss for name, (module, loss) in MISSING.items() if not is_installed(module)}


def read_versions() -> dict[str, str]:
    """Of what the results depend on."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    if torch.version.cuda:
        versions["cuda"] = torch.version.cuda
    if torch.cuda.is_available():
        versions["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    for name in ("megatron-core", "transformer_engine", "triton", "numpy"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def list_gpus() -> list[dict[str, object]]:
    """Name, memory in GiB and compute capability of each."""
    found: list[dict[str, object]] = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        gpu = torch.cuda.get_device_properties(index)
        found.append(
            {
                "name": gpu.name,
                "gib": round(gpu.total_memory / 2**30, 1),
                "capability": f"{gpu.major}.{gpu.minor}",
            }
        )
    return found
