"""megatron-bridge, which knows how parameters of Megatron and of Hugging Face models correspond."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_llep.integration.local_attention import PackedDotProductAttention
from megatron_llep.training.hf.te_stub import transformer_engine_named

Task = Any
"""Bridge's WeightConversionTask: a parameter of this rank, or of another, and its mapping."""


def open_bridge(folder: Path) -> tuple[Any, Any]:
    """Bridge for the model that a folder's `config.json` describes.

    Returns:
        The bridge, and the configuration as transformers reads it.
    """
    import transformers

    get_model_bridge = import_bridge()
    config = transformers.AutoConfig.from_pretrained(folder)
    architecture = config.architectures[0] if config.architectures else None
    if architecture is None:
        raise ValueError(f"{folder / 'config.json'} has no architectures; add the model's class")
    known = getattr(transformers, architecture, architecture)
    return get_model_bridge(known, hf_config=config), config


def import_bridge() -> Any:
    """Bridge's function from an architecture to its bridge."""
    # Of models nobody asked for, Bridge logs what it cannot import.
    logging.disable(logging.INFO)
    try:
        with transformer_engine_named():
            from megatron.bridge.models.conversion.model_bridge import get_model_bridge
            from megatron.bridge.models.conversion.param_mapping import AutoMapping
    finally:
        logging.disable(logging.NOTSET)
    # Bridge knows modules by their class's name; this one has attention's sinks, of its own heads.
    AutoMapping.register_module_type(PackedDotProductAttention.__name__, "column")
    return get_model_bridge


def local_tasks(tasks: Sequence[Task], chunks: Sequence[torch.nn.Module]) -> list[Task]:
    """The tasks of this rank's parameters; all ranks call it.

    Bridge leaves out, with a warning, what it finds no counterpart of.

    Raises:
        ValueError: on all ranks, if any has a parameter without a task; names it.
    """
    tasks = [task for task in tasks if task is not None and task.megatron_module is not None]
    with_task = {(task.vp_stage, task.param_name) for task in tasks}
    without = [
        name
        for stage, chunk in enumerate(chunks)
        for name, _ in chunk.named_parameters()
        if (stage, name) not in with_task
    ]
    if everywhere := sorted(gather_names(without)):
        raise ValueError(
            f"{len(everywhere)} parameters have no counterpart in the Hugging Face model, the "
            f"first is {everywhere[0]}"
        )
    return tasks


def gather_names(names: Sequence[str]) -> set[str]:
    """The names that any rank gives; all ranks call it."""
    of_all: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(of_all, sorted(names))
    return {name for of_rank in of_all for name in of_rank}
