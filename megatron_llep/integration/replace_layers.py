"""Replaces the MoE layers of a specification, wherever they stand in it.

Megatron's specifications are dataclasses, lists and partial calls within each other: of a layer, of
a block of layers, of a hybrid stack.
"""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import is_dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.spec_utils import ModuleSpec, get_module

from megatron_llep.layer import LLEPMoELayer

Settings = Mapping[str, Any]
"""Keywords of LLEPMoELayer beside those of MoELayer."""


def replace_moe_layers(spec: Any, settings: Settings, path: str = "the specification") -> Any:
    """Copy a specification with LLEPMoELayer in the place of MoELayer.

    Args:
        spec: a specification, or a part of one.
        settings: for each layer.
        path: where the part stands, for messages.

    Returns:
        A copy of whatever holds MoE layers; the very same object where it holds none.

    Raises:
        ValueError: it holds a subclass of MoELayer, whose own behaviour would be lost.
    """
    if isinstance(spec, type):
        return partial(LLEPMoELayer, **settings) if _is_moe_layer(spec, path) else spec
    if isinstance(spec, partial):
        return _replace_in_call(spec, settings, path)
    if isinstance(spec, ModuleSpec):
        # As a dynamic import, it is a tuple.
        module = get_module(spec) if isinstance(spec.module, tuple) else spec.module
        if _is_moe_layer(module, path):
            return _copy(spec, module=LLEPMoELayer, params={**spec.params, **settings})
    if type(spec) in (list, tuple):
        changes = _replace_in(enumerate(spec), settings, path)
        return type(spec)(changes.get(n, each) for n, each in enumerate(spec)) if changes else spec
    if type(spec) is dict:
        changes = _replace_in(spec.items(), settings, path)
        return spec | changes if changes else spec
    if hasattr(spec, "__dict__") and (is_dataclass(spec) or isinstance(spec, SimpleNamespace)):
        changes = _replace_in(vars(spec).items(), settings, path)
        return _copy(spec, **changes) if changes else spec
    return spec


def _replace_in_call(call: partial, settings: Settings, path: str) -> partial:
    if _is_moe_layer(call.func, path):
        return partial(LLEPMoELayer, *call.args, **{**call.keywords, **settings})
    args = replace_moe_layers(call.args, settings, path)
    changes = _replace_in(call.keywords.items(), settings, path)
    if args is call.args and not changes:
        return call
    return partial(call.func, *args, **{**call.keywords, **changes})


def _replace_in(named: Iterable[tuple[Any, Any]], settings: Settings, path: str) -> dict[Any, Any]:
    """The values that change, by name."""
    replaced = {
        name: (value, replace_moe_layers(value, settings, f"{path}, {name}"))
        for name, value in named
    }
    return {name: after for name, (before, after) in replaced.items() if after is not before}


def _is_moe_layer(module: Any, path: str) -> bool:
    if not (isinstance(module, type) and issubclass(module, MoELayer)):
        return False
    if module is not MoELayer and not issubclass(module, LLEPMoELayer):
        raise ValueError(
            f"--moe-llep: cannot convert a {module.__name__} ({path}); "
            "only megatron.core's MoELayer itself is supported"
        )
    return module is MoELayer


def _copy(spec: Any, **changes: Any) -> Any:
    copied = copy.copy(spec)
    for name, value in changes.items():
        object.__setattr__(copied, name, value)  # also where it is frozen
    return copied
