"""Megatron 0.18: packs of a micro-batch side by side in one sequence.

Letters: B packs of a micro-batch, S tokens each.
"""

import torch

Batch = dict[str, torch.Tensor | None]
_BY_TOKEN = ("tokens", "labels", "loss_mask", "position_ids")


def flatten_packs(batch: Batch) -> Batch:
    """Make one sequence of a micro-batch's packs, as Megatron 0.19 does.

    Args:
        batch: tensors [B, S], or None; cu_seqlens, int32 [B, n], each row from 0 to S and then S
            again as padding; max_seqlen, [B].

    Returns:
        The same with [1, B * S], cu_seqlens [1, n] from 0 to B * S without padding, and [1].
    """
    cu_seqlens, longest = batch["cu_seqlens"], batch["max_seqlen"]
    assert cu_seqlens is not None, "the dataset says where segments start"
    assert longest is not None, "and how long the longest is"
    B, S = len(cu_seqlens), int(cu_seqlens[0, -1])
    starts = [row[row < S] + i * S for i, row in enumerate(cu_seqlens)]
    flat: Batch = {"cu_seqlens": torch.cat([*starts, cu_seqlens.new_tensor([B * S])])[None]}
    flat["max_seqlen"] = longest.max()[None]
    for name in _BY_TOKEN:
        value = batch.get(name)
        flat[name] = None if value is None else value.reshape(1, -1)
    return batch | flat
