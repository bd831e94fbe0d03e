"""What the frameworks import and these tests do not run, by empty stand-ins.

Transformer Engine has no wheel, and builds for 15 minutes; the others come with CUDA packages, pin
other versions, or want a GPU at import. A name of theirs is a class that does nothing.
"""

import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch

_PACKAGES = (
    "transformer_engine",
    "nvidia_resiliency_ext",
    "modelopt",
    "megatron.energon",
)
_TE_CLASSES = (
    "TEColumnParallelGroupedLinear",
    "TEColumnParallelLinear",
    "TEDotProductAttention",
    "TEGroupedLinear",
    "TELayerNormColumnParallelLinear",
    "TELinear",
    "TENorm",
    "TERowParallelGroupedLinear",
    "TERowParallelLinear",
)


class _Nothing(torch.nn.Module):
    """A class that may be a base, a type to look for, or a decorator."""


class _StubModule(ModuleType):
    """A module whose capitalised names are classes; other names are modules, or return nothing."""

    __path__: Sequence[str] = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name[0].isupper():
            made: Any = type(name, (_Nothing,), {"__module__": self.__name__})
        else:
            made = _StubModule(f"{self.__name__}.{name}")
        setattr(self, name, made)
        return made

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        return None


class _StubFinder:
    """Finds modules of the packages that are not installed; and it loads them."""

    def __init__(self, packages: Sequence[str]) -> None:
        self._packages = packages

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if any(name == each or name.startswith(each + ".") for each in self._packages):
            return ModuleSpec(name, self, is_package=True)  # type: ignore[arg-type]
        return None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _StubModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def install_stubs() -> None:
    """For the rest of this process; Megatron has looked for Transformer Engine before."""
    import megatron.core.extensions.transformer_engine as extension
    import megatron.training.training  # noqa: F401

    missing = [name for name in _PACKAGES if not _is_installed(name)]
    sys.meta_path.append(_StubFinder(missing))  # type: ignore[arg-type]
    if "transformer_engine" in missing:
        # Without it these are no classes; the frameworks ask what is an instance of them.
        for name in _TE_CLASSES:
            setattr(extension, name, type(name, (_Nothing,), {}))


def _is_installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None
