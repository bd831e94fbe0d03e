"""Which layers of multi-token prediction the MoE layers of a hybrid model are.

Megatron numbers them from 1 within each depth and does not tell them that they are of multi-token
prediction. They would be taken for the model's first layers, in metrics and in errors.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from megatron.core.transformer.moe.router import Router
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionLayer
from megatron.core.transformer.spec_utils import ModuleSpec

from megatron_llep.layer import LLEPMoELayer
from megatron_llep.observe.watch import find_hook


class NumberedMTPLayer(MultiTokenPredictionLayer):
    """Megatron's, one depth, in which LLEP's layers know their place."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        number_mtp_layers([self])


def number_mtp_layers(chunks: Iterable[torch.nn.Module]) -> None:
    """Number LLEP's layers in multi-token prediction, from 1, over all its depths.

    Their routers keep Megatron's numbers, for its own metrics. Those of GPT models are right.
    Of routers that are observed the hooks are numbered, as nothing of Megatron's is changed.
    """
    for depth in (each for chunk in chunks for each in chunk.modules()):
        pattern = getattr(depth, "mtp_layer_pattern", None)
        if not isinstance(depth, MultiTokenPredictionLayer) or pattern is None:
            continue
        before = (depth.layer_number - 1) * len(pattern)
        for number, layer in enumerate(depth.mtp_model_layer.layers, start=before + 1):
            for module in layer.modules():
                if isinstance(module, LLEPMoELayer):
                    module.is_mtp_layer, module.layer_number = True, number
                elif isinstance(module, Router) and (hook := find_hook(module)) is not None:
                    hook.mtp_number = number


def with_numbered_mtp(spec: Any) -> Any:
    """Copy the specification of a hybrid stack, so that what is built numbers itself.

    Args:
        spec: of anything; what is no hybrid stack is returned as it is.
    """
    if isinstance(spec, ModuleSpec) and hasattr(spec.submodules, "mtp_block_spec"):
        return replace(spec, submodules=with_numbered_mtp(spec.submodules))
    block = getattr(spec, "mtp_block_spec", None)
    if block is None:
        return spec
    layers = [
        replace(each, module=NumberedMTPLayer)
        if isinstance(each, ModuleSpec) and each.module is MultiTokenPredictionLayer
        else each
        for each in block.submodules.layer_specs
    ]
    submodules = replace(block.submodules, layer_specs=layers)
    return replace(spec, mtp_block_spec=replace(block, submodules=submodules))
