"""What is missing on this machine."""

import importlib.util

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
