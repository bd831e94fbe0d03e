"""Least-Loaded Expert Parallelism (LLEP, arXiv 2601.17111) for Megatron-core training.

The names below load their modules on first use, so that `megatron_llep.planner` stays free of
torch and `megatron_llep.device` can prepare torch before Megatron is imported.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_llep.config import LLEPConfig
    from megatron_llep.integration.arguments import add_llep_arguments, llep_config_from_args
    from megatron_llep.integration.convert import convert_model, llep_hook, with_llep
    from megatron_llep.integration.no_lending import no_lending
    from megatron_llep.integration.read_metrics import read_metrics
    from megatron_llep.integration.release_buffers import release_buffers
    from megatron_llep.integration.watch_loads import watch_loads
    from megatron_llep.planner import Plan, make_plan

__version__ = "0.1.0"

_HOME_MODULE = {
    "LLEPConfig": "megatron_llep.config",
    "Plan": "megatron_llep.planner",
    "add_llep_arguments": "megatron_llep.integration.arguments",
    "convert_model": "megatron_llep.integration.convert",
    "llep_config_from_args": "megatron_llep.integration.arguments",
    "llep_hook": "megatron_llep.integration.convert",
    "make_plan": "megatron_llep.planner",
    "no_lending": "megatron_llep.integration.no_lending",
    "read_metrics": "megatron_llep.integration.read_metrics",
    "release_buffers": "megatron_llep.integration.release_buffers",
    "watch_loads": "megatron_llep.integration.watch_loads",
    "with_llep": "megatron_llep.integration.convert",
}

__all__ = [
    "LLEPConfig",
    "Plan",
    "__version__",
    "add_llep_arguments",
    "convert_model",
    "llep_config_from_args",
    "llep_hook",
    "make_plan",
    "no_lending",
    "read_metrics",
    "release_buffers",
    "watch_loads",
    "with_llep",
]


def __getattr__(name: str) -> Any:
    """Import the module that holds `name` and return the name from it."""
    if name not in _HOME_MODULE:
        raise AttributeError(f"module 'megatron_llep' has no attribute {name!r}")
    return getattr(import_module(_HOME_MODULE[name]), name)
