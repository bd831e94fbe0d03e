"""Context parallelism without Transformer Engine: attention over the whole sequence, on every rank.

Letters: C ranks that share a sequence, s tokens of a rank, S = C * s, b = micro-batch size.

As in Megatron a sequence is cut into 2 * C pieces, and rank r has pieces r and 2 * C - 1 - r.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_batch_on_this_cp_rank


class GatheringAttention(DotProductAttention):
    """Megatron's local attention on gathered queries, keys and values; keeps this rank's rows."""

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any):
        # Of this module alone: Megatron's attention refuses to be built for a part of a sequence.
        super().__init__(replace(config, context_parallel_size=1), *args, **kwargs)

    def forward(self, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """[s, b, ...] -> [s, b, H]."""
        group = parallel_state.get_context_parallel_group()
        C = group.size()
        pieces = [piece for rank in range(C) for piece in (rank, 2 * C - 1 - rank)]
        # Its backward adds up what each rank's rows give to the others' keys and values.
        gathered = (
            gather_from_sequence_parallel_region(x, group=group) for x in (query, key, value)
        )
        whole = (_reorder(x, torch.tensor(pieces).argsort()) for x in gathered)
        output = _reorder(super().forward(*whole, *args, **kwargs), torch.tensor(pieces))
        return output.chunk(C)[group.rank()]


def with_gathering_attention(block: TransformerBlockSubmodules) -> TransformerBlockSubmodules:
    """A block's specification with this attention in all layers: `Run.spec`."""
    return replace(block, layer_specs=[_replace_attention(layer) for layer in block.layer_specs])


def forward_part(iterator: Iterator[torch.Tensor], model: Any) -> tuple[torch.Tensor, Any]:
    """This rank's part of a micro-batch [b, S + 1], with the loss per token: `Run.forward_step`."""
    tokens = next(iterator)
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    positions = torch.arange(inputs.shape[1]).expand_as(inputs)
    batch = {"tokens": inputs, "labels": labels, "position_ids": positions}
    group = parallel_state.get_context_parallel_group()
    batch = get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=group)
    output = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
    return output, partial(_sum_up, labels.numel())


def _sum_up(tokens: int, losses: torch.Tensor) -> tuple[Any, ...]:
    count = torch.tensor(losses.numel(), dtype=torch.int)
    return losses.sum(), count, {"loss": losses.detach().sum() / tokens}


def _reorder(rows: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Pieces of [S, ...] in another order."""
    return rows.unflatten(0, (len(order), -1))[order].flatten(0, 1)


def _replace_attention(layer: ModuleSpec) -> ModuleSpec:
    attention = layer.submodules.self_attention
    submodules = replace(attention.submodules, core_attention=GatheringAttention)
    attention = replace(attention, submodules=submodules)
    return replace(layer, submodules=replace(layer.submodules, self_attention=attention))
