"""The LLEP layers of a model."""

from collections.abc import Iterable

import torch

from megatron_llep.layer import LLEPMoELayer
from megatron_llep.lending.shared import SharedLending


def find_layers(model: torch.nn.Module | Iterable[torch.nn.Module]) -> list[LLEPMoELayer]:
    """All of them, in the order of the model's modules.

    Args:
        model: or its chunks, wrapped or not.
    """
    chunks = [model] if isinstance(model, torch.nn.Module) else model
    modules = (module for chunk in chunks for module in chunk.modules())
    return [module for module in modules if isinstance(module, LLEPMoELayer)]


def find_shared(model: torch.nn.Module | Iterable[torch.nn.Module]) -> list[SharedLending]:
    """What these layers share, each once: one of a converted model, one of each specification."""
    return list(
        {id(layer.shared_lending): layer.shared_lending for layer in find_layers(model)}.values()
    )
