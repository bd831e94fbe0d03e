"""Replaces the MoE layers of a specification, wherever they stand in it."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.spec_utils import ModuleSpec, get_module

from megatron_llep.integration.spec_parts import copy_with, replace_parts
from megatron_llep.layer import LLEPMoELayer

Settings = Mapping[str, Any]
"""Keywords of LLEPMoELayer beside those of MoELayer."""


def replace_moe_layers(spec: Any, settings: Settings) -> Any:
    """Copy a specification with LLEPMoELayer in the place of MoELayer.

    Args:
        spec: a specification, or a part of one.
        settings: for each layer.

    Returns:
        A copy of whatever holds MoE layers; the very same object where it holds none.

    Raises:
        ValueError: it holds a subclass of MoELayer, whose own behaviour would be lost.
    """
    return replace_parts(spec, partial(_replace, settings))


def _replace(settings: Settings, part: Any, path: str) -> Any:
    """The part, or what replaces it if it is a layer."""
    if isinstance(part, type) and _is_moe_layer(part, path):
        return partial(LLEPMoELayer, **settings)
    if isinstance(part, partial) and _is_moe_layer(part.func, path):
        return partial(LLEPMoELayer, *part.args, **{**part.keywords, **settings})
    if isinstance(part, ModuleSpec):
        # As a dynamic import, it is a tuple.
        module = get_module(part) if isinstance(part.module, tuple) else part.module
        if _is_moe_layer(module, path):
            return copy_with(part, module=LLEPMoELayer, params={**part.params, **settings})
    return part


def _is_moe_layer(module: Any, path: str) -> bool:
    if not (isinstance(module, type) and issubclass(module, MoELayer)):
        return False
    if module is not MoELayer and not issubclass(module, LLEPMoELayer):
        raise ValueError(
            f"--moe-llep: cannot convert a {module.__name__} ({path}); "
            "only megatron.core's MoELayer itself is supported"
        )
    return module is MoELayer
