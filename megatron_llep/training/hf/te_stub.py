"""Lets megatron-bridge be imported where Transformer Engine is not.

One of its files for LoRA names Transformer Engine in annotations, so that importing any of Bridge
needs the package. Here stands an empty one with that name for as long as Bridge is imported, and
no longer: everybody else goes on to see that there is none.
"""

import contextlib
import importlib.util
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import torch

_PACKAGE = "transformer_engine"


@contextlib.contextmanager
def transformer_engine_named() -> Iterator[None]:
    """Answer `import transformer_engine.pytorch` where it is not installed."""
    if importlib.util.find_spec(_PACKAGE) is not None:
        yield
        return
    # These decide whether there is Transformer Engine, once: before the stub is there.
    import megatron.core.extensions.transformer_engine
    import megatron.training.training  # noqa: F401

    package, pytorch = ModuleType(_PACKAGE), ModuleType(f"{_PACKAGE}.pytorch")
    for module in (package, pytorch):
        module.__spec__ = ModuleSpec(module.__name__, None)
        sys.modules[module.__name__] = module
    pytorch.ops = SimpleNamespace(Sequential=torch.nn.Sequential)  # type: ignore[attr-defined]
    package.pytorch = pytorch  # type: ignore[attr-defined]
    package.__path__ = []
    try:
        yield
    finally:
        for module in (package, pytorch):
            del sys.modules[module.__name__]
