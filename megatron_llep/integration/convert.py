"""Switching LLEP on: in a layer specification, or in a model that is built but not yet wrapped.

Both ends in the same `LLEPMoELayer`. Specifications are what training scripts pass around; the
model hook also reaches layers whose specification Megatron derives by itself, such as those of
multi-token prediction.
"""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.spec_utils import ModuleSpec

from megatron_llep.config import LLEPConfig
from megatron_llep.layer import LLEPMoELayer
from megatron_llep.lending.progress import Progress
from megatron_llep.lending.shared import SharedLending
from megatron_llep.metrics import install_tracker


def with_llep(spec: Any, config: LLEPConfig) -> Any:
    """Copy a layer or block specification, with every `MoELayer` in it replaced.

    Args:
        spec: a transformer layer's `ModuleSpec`, or a block's `TransformerBlockSubmodules`.
        config: LLEP's settings; `enabled=False` returns the specification as it is.
    """
    if not config.enabled:
        return spec
    install_tracker()
    shared = SharedLending()
    if hasattr(spec, "layer_specs"):
        spec = copy.copy(spec)
        spec.layer_specs = [_replace_mlp(layer, config, shared) for layer in spec.layer_specs]
        return spec
    return _replace_mlp(spec, config, shared)


def convert_model(
    model: Sequence[torch.nn.Module],
    config: LLEPConfig,
    pg_collection: ProcessGroupCollection | None = None,
    progress: Progress | None = None,
) -> list[torch.nn.Module]:
    """Convert every MoE layer of a built model, before DDP wraps it; all ranks call it.

    Args:
        model: the model chunks of this rank's pipeline stage.
        config: LLEP's settings; `enabled=False` changes nothing.
        pg_collection: the model's process groups. Default: Megatron's global ones.
        progress: told by the layers where this rank is; a caller adds it to errors of training.

    Returns:
        The same chunks.
    """
    chunks = list(model)
    if not config.enabled:
        return chunks
    install_tracker()
    shared = SharedLending(progress)
    pg_collection = pg_collection or get_default_pg_collection()
    for chunk in chunks:
        for layer in chunk.modules():
            if isinstance(layer, MoELayer) and not isinstance(layer, LLEPMoELayer):
                LLEPMoELayer.convert(layer, llep=config, shared=shared, pg_collection=pg_collection)
    return chunks


def llep_hook(config: LLEPConfig) -> Callable[[list[torch.nn.Module]], list[torch.nn.Module]]:
    """`convert_model` as a hook for Megatron's `GPTModelConfig.pre_wrap_hooks`."""
    return partial(convert_model, config=config)


def _replace_mlp(layer: ModuleSpec, config: LLEPConfig, shared: SharedLending) -> ModuleSpec:
    """Copy a transformer layer's specification with LLEPMoELayer in the place of MoELayer."""
    mlp = layer.submodules.mlp
    build = partial(LLEPMoELayer, llep=config, shared=shared)
    if isinstance(mlp, partial) and mlp.func is MoELayer:
        mlp = partial(build, *mlp.args, **mlp.keywords)
    elif isinstance(mlp, ModuleSpec) and mlp.module is MoELayer:  # Megatron before 0.18
        mlp = partial(build, submodules=mlp.submodules, **mlp.params)
    else:
        return layer  # a dense layer
    layer = copy.copy(layer)
    layer.submodules = copy.copy(layer.submodules)
    layer.submodules.mlp = mlp
    return layer
