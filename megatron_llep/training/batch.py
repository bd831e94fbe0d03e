"""This rank's part of the next micro-batch, by Megatron's own functions.

Letters: B sequences of a micro-batch, S tokens each; packed ones are one of B * S.
"""

from collections.abc import Iterator

import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.multi_token_prediction import mtp_on_this_rank
from megatron.core.utils import (
    get_batch_on_this_cp_rank,
    get_batch_on_this_tp_rank,
)
from megatron.training import get_args
from megatron.training.utils.common_utils import is_first_or_last_pipeline_stage

from megatron_llep.compat.training import flatten_packs

Batch = dict[str, torch.Tensor | None]
_MODEL_INPUTS = ("tokens", "labels", "loss_mask", "attention_mask", "position_ids")


def get_batch(
    data_iterator: Iterator[Batch] | None, vp_stage: int | None, *, packed: bool, evaluates: bool
) -> tuple[Batch, PackedSeqParams | None]:
    """Read the next micro-batch, on the first rank of each tensor-parallel group, and share it.

    Args:
        data_iterator: None on ranks that read no data.
        vp_stage: index of the virtual pipeline stage, if there are several.
        packed: whether sequences are packs: then every stage is told where segments start.
        evaluates: whether the micro-batch is one of evaluation.

    Returns:
        The model's inputs, None for what this stage does not need, and how they are packed.
    """
    args = get_args()
    has_mtp = args.mtp_num_layers is not None and mtp_on_this_rank(
        mtp_num_layers=args.mtp_num_layers, ignore_virtual=vp_stage is None, vp_stage=vp_stage
    )
    if not (is_first_or_last_pipeline_stage(vp_stage) or has_mtp or packed):
        return dict.fromkeys(_MODEL_INPUTS), None
    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    batch: Batch = {}
    if tp_rank == 0:
        assert data_iterator is not None, "the first tensor-parallel rank reads the data"
        batch = {
            name: None if value is None else value.cuda(non_blocking=True)
            for name, value in next(data_iterator).items()
        }
    stage = {"ignore_virtual": vp_stage is None, "vp_stage": vp_stage}
    batch = get_batch_on_this_tp_rank(
        batch,
        packed,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader and not packed,
        broadcast_src_rank=parallel_state.get_tensor_model_parallel_src_rank(),
        broadcast_group=parallel_state.get_tensor_model_parallel_group(),
        cp_size=args.context_parallel_size,
        tp_rank=tp_rank,
        micro_batch_size=args.eval_micro_batch_size if evaluates else args.micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=has_mtp,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=parallel_state.is_pipeline_first_stage(**stage),
        is_pipeline_last_stage=parallel_state.is_pipeline_last_stage(**stage),
    )
    if packed:
        batch = flatten_packs(batch)
    else:
        batch = get_batch_on_this_cp_rank(
            batch, is_hybrid_cp=False, cp_group=parallel_state.get_context_parallel_group()
        )
    inputs = {name: batch.get(name) for name in _MODEL_INPUTS}
    return inputs, _describe_pack(batch) if packed else None


def _describe_pack(batch: Batch) -> PackedSeqParams:
    cu_seqlens, max_seqlen = batch["cu_seqlens"], batch["max_seqlen"]
    assert cu_seqlens is not None, "the dataset says where segments start"
    assert max_seqlen is not None, "and how long the longest is"
    longest = int(max_seqlen.item())
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens[0],
        cu_seqlens_kv=cu_seqlens[0],
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )
