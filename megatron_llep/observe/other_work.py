"""How long the rest of a model takes: what is not routed experts."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import VocabParallelEmbedding
from megatron.core.transformer.moe.moe_layer import MoELayer

from megatron_llep.planner.cost.model import CostModel

_LOOKED_UP = (VocabParallelEmbedding, torch.nn.Embedding)


def predict_other_seconds(chunks: Iterable[torch.nn.Module], model: CostModel) -> float:
    """Seconds that this stage's matrices take for a token of a rank, forward and backward.

    They run at the cost model's full rate. Attention's scores, norms and communication are left
    out. A rank's tokens are those of its router: the matrices see those of all ranks that share
    them in tensor parallelism, and each rank has its share of a matrix.

    Args:
        chunks: of this rank's stage, not yet wrapped.
        model: the machine.
    """
    flops = 0
    for chunk in chunks:
        config: Any = getattr(chunk, "config", None)
        sharing = getattr(config, "tensor_model_parallel_size", 1)
        flops += 2 * sum(_list_matrices(chunk)) * sharing
    return flops / model.flops_per_second * (1 + model.backward_factor)


def _list_matrices(chunk: torch.nn.Module) -> Iterator[int]:
    """Numbers in each matrix that is multiplied for every token, on this rank."""
    experts = {
        id(parameter)
        for layer in chunk.modules()
        if isinstance(layer, MoELayer)
        for parameter in layer.experts.parameters()
    }
    for module in chunk.modules():
        if isinstance(module, _LOOKED_UP):
            continue
        for parameter in module.parameters(recurse=False):
            if parameter.dim() >= 2 and id(parameter) not in experts:
                yield parameter.numel()
    ties = getattr(chunk, "share_embeddings_and_output_weights", False)
    if ties and getattr(chunk, "post_process", False):
        yield chunk.shared_embedding_or_output_weight().numel()
