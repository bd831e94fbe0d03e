"""Least-Loaded Expert Parallelism (LLEP, arXiv 2601.17111) for Megatron-core training.

The names below load their modules on first use, so that `megatron_llep.planner` stays free of
torch and `megatron_llep.device` can prepare torch before Megatron is imported.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_llep.config import LLEPConfig
    from megatron_llep.planner import Plan, make_plan

__version__ = "0.1.0"

_HOME_MODULE = {
    "LLEPConfig": "megatron_llep.config",
    "Plan": "megatron_llep.planner",
    "make_plan": "megatron_llep.planner",
}

__all__ = ["LLEPConfig", "Plan", "__version__", "make_plan"]


def __getattr__(name: str) -> Any:
    """Import the module that holds `name` and return the name from it."""
    if name not in _HOME_MODULE:
        raise AttributeError(f"module 'megatron_llep' has no attribute {name!r}")
    return getattr(import_module(_HOME_MODULE[name]), name)
