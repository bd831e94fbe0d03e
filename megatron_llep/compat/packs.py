"""Megatron 0.18: one pack a micro-batch, of S tokens."""

import torch

Batch = dict[str, torch.Tensor | None]


def flatten_packs(batch: Batch) -> Batch:
    """Cut off what only pads cu_seqlens, [1, n]: more entries of S behind the first."""
    cu_seqlens = batch["cu_seqlens"]
    assert cu_seqlens is not None, "the dataset says where segments start"
    assert len(cu_seqlens) == 1, "checked with the arguments"
    count = int((cu_seqlens[0] < cu_seqlens[0, -1]).sum())
    return batch | {"cu_seqlens": cu_seqlens[:, : count + 1]}
