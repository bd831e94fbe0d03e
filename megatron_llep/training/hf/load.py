"""Weights of a Hugging Face folder into a Megatron model that is built and not yet wrapped."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.training.utils import print_rank_0

from megatron_llep.training.hf.bridge import Task, gather_names, local_tasks, open_bridge
from megatron_llep.training.hf.config_file import read_config
from megatron_llep.training.hf.source import OUTPUT, FolderModel, FolderWeights
from megatron_llep.training.hf.weight_files import list_tensors


def load_hf(
    chunks: Sequence[torch.nn.Module], folder: Path, *, tied: bool, padded_vocab_size: int
) -> None:
    """Fill all parameters of this rank's model chunks; all ranks call it.

    Args:
        chunks: not yet wrapped, of any layout, with or without LLEP.
        folder: the Hugging Face model.
        tied: whether the output layer is the embedding.
        padded_vocab_size: rows of the embedding in Megatron.

    Raises:
        ValueError: on all ranks, if the folder lacks a tensor, or has one more than the model.
    """
    config = read_config("--hf-load", folder)
    bridge, transformers_config = open_bridge(folder)
    weights = FolderWeights(
        list_tensors("--hf-load", folder),
        model_type=config.model_type,
        tied=tied,
        padded_vocab_size=padded_vocab_size,
    )
    model = FolderModel(transformers_config, weights, str(folder))
    tasks = _tasks(bridge, model, chunks, folder)
    _refuse_unused(tasks, weights, folder, config.require("num_hidden_layers"))
    read = _Reader(bridge, weights)
    copied = sum(_copy(task, read(task)) for task in tasks)
    print_rank_0(f"loaded {folder} ({copied:,} parameters on rank 0)")


class _Reader:
    """Reads what a task needs; experts that share a tensor get it from one read."""

    def __init__(self, bridge: Any, weights: FolderWeights) -> None:
        self._bridge = bridge
        self._weights = weights
        self._shared: dict[str, Any] = {}
        self._layer = ""

    def __call__(self, task: Task) -> Any:
        name = task.mapping.hf_param
        if not getattr(task.mapping, "is_grouped_export", False):
            return self._bridge.maybe_modify_loaded_hf_weight(name, self._weights)
        layer = name.partition(".mlp.")[0]
        if layer != self._layer:  # tasks come layer by layer
            self._layer = layer
            self._shared.clear()
        if name not in self._shared:
            self._shared[name] = self._bridge.maybe_modify_loaded_hf_weight(name, self._weights)
        return self._shared[name]


def _tasks(
    bridge: Any, model: FolderModel, chunks: Sequence[torch.nn.Module], folder: Path
) -> list[Task]:
    try:
        return local_tasks(bridge.build_conversion_tasks(model, list(chunks)), chunks)
    except ValueError as error:
        raise ValueError(
            f"--hf-load {folder}: {error}; the folder's weights are not complete, or of another "
            "model"
        ) from error


def _refuse_unused(
    tasks: Sequence[Task], weights: FolderWeights, folder: Path, layers: int
) -> None:
    """Refuse tensors that no rank takes: they would be lost."""
    taken: set[str] = set()
    for task in tasks:
        names = task.mapping.hf_param
        for name in [names] if isinstance(names, str) else names.values():
            taken |= {weights.stored_name(name)} if name in weights else _quantized(name)
    taken = gather_names(sorted(taken))
    unused = sorted(
        name
        for name in {weights.stored_name(name) for name in weights} - taken
        if not _may_be_left(name, taken, layers)
    )
    if unused:
        raise ValueError(
            f"--hf-load {folder}: the model has no place for {len(unused)} of its tensors, the "
            f"first is {unused[0]}; compare config.json with the weights"
        )


def _quantized(name: str) -> set[str]:
    """What stands for a tensor in MXFP4."""
    return {f"{name}_blocks", f"{name}_scales"}


def _may_be_left(name: str, taken: set[str], layers: int) -> bool:
    if name == OUTPUT or name.endswith(".rotary_emb.inv_freq"):
        return True
    if name.removesuffix("_scale_inv") in taken:  # of FP8 weights
        return True
    # Layers of multi-token prediction, of a model that is trained without.
    return name.startswith(f"model.layers.{layers}.")


@torch.no_grad()
def _copy(task: Task, weights: Any) -> int:
    """Cut a tensor for this rank and copy it; the number of its elements."""
    converted = task.mapping.hf_to_megatron(weights, task.megatron_module)
    parameter = task.param_weight
    if converted.shape != parameter.shape:
        raise ValueError(
            f"--hf-load: {task.mapping.hf_param} gives {task.param_name} the shape "
            f"{tuple(converted.shape)}, and it has {tuple(parameter.shape)}; compare config.json "
            "with the weights"
        )
    parameter.copy_(converted)
    return parameter.numel()
