"""Attention without Transformer Engine, over packed sequences (THD) and with values of any width.

Megatron's `DotProductAttention` refuses packed sequences. One mask over the whole pack would do for
plain causal attention only: with a sliding window, Megatron's softmax ignores the mask it is given.
So Megatron's attention runs over the segments as a batch, those of similar length together.

Multi-latent attention has heads of values with a width of their own.

Letters: T tokens of the pack, B segments of a group, S its longest, N heads (G of keys and values),
D head dimension, V that of values.
"""

import itertools
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.dot_product_attention import DotProductAttention

_SMALLEST_STEP = 8


class PackedDotProductAttention(DotProductAttention):
    """Megatron's attention, for packs too: exact with windows and sinks, and causal within each."""

    def __init__(
        self,
        *args: Any,
        k_channels: int | None = None,
        v_channels: int | None = None,
        **kwargs: Any,
    ):
        """As `DotProductAttention`, and with the widths that multi-latent attention gives.

        Args:
            args: as Megatron's.
            k_channels: D; given by multi-latent attention, which has N keys. Tensors say it too.
            v_channels: V; default: D. As for keys.
            kwargs: as Megatron's.
        """
        super().__init__(*args, **kwargs)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *args: Any,
        packed_seq_params: PackedSeqParams | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """As `DotProductAttention.forward`; of a pack, the query is [T, N, D].

        Args:
            query: [T, N, D] of a pack, else as Megatron's.
            key: [T, G, D].
            value: [T, G, V].
            attention_mask: not used for a pack.
            args: as Megatron's.
            packed_seq_params: where segments start; None: no pack.
            kwargs: as Megatron's.

        Returns:
            [T, N * V] of a pack, else as Megatron's.
        """
        # Megatron folds heads into this, which it sets for values as wide as --kv-channels.
        self.hidden_size_per_partition = self.num_attention_heads_per_partition * value.shape[-1]
        if packed_seq_params is None:
            return super().forward(query, key, value, attention_mask, *args, **kwargs)
        contexts, rows_of_contexts = [], []
        for S, segments in _group_by_length(packed_seq_params.cu_seqlens_q.tolist()).items():
            start, length = torch.tensor(segments).T
            offset = torch.arange(S)[:, None]
            # [S, B]; behind a segment's end its last row is repeated: nothing before attends to it.
            rows = start + torch.minimum(offset, length - 1)
            is_read = offset < length
            batch = (each[rows] for each in (query, key, value))
            contexts.append(super().forward(*batch, None, *args, **kwargs)[is_read])
            rows_of_contexts.append(rows[is_read])
        return torch.cat(contexts)[torch.cat(rows_of_contexts).argsort()]


def _group_by_length(starts: list[int]) -> dict[int, list[tuple[int, int]]]:
    """Segments by the length they are padded to: (start, length) of each."""
    groups: dict[int, list[tuple[int, int]]] = {}
    for start, end in itertools.pairwise(starts):
        if end > start:
            groups.setdefault(_round_up(end - start), []).append((start, end - start))
    return {
        min(S, max(length for _, length in segments)): segments for S, segments in groups.items()
    }


def _round_up(length: int) -> int:
    """To a multiple of a quarter to half of the length: few groups, and little padding in each."""
    step = max(_SMALLEST_STEP, 1 << max(0, (length - 1).bit_length() - 2))
    return -(-length // step) * step
