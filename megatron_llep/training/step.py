"""One forward step of a GPT model, as Megatron's schedules call it.

Letters: B sequences of a micro-batch, S tokens each.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.transformer.multi_token_prediction import mtp_on_this_rank
from megatron.core.utils import (
    StragglerDetector,
    get_attr_wrapped_model,
    get_batch_on_this_cp_rank,
    get_batch_on_this_tp_rank,
)
from megatron.training import get_args, get_timers
from megatron.training.utils.common_utils import is_first_or_last_pipeline_stage

Batch = dict[str, torch.Tensor | None]
_MODEL_INPUTS = ("tokens", "labels", "loss_mask", "attention_mask", "position_ids")
# How many times the largest loss so far a loss must be for --check-for-spiky-loss to report it.
_SPIKE = 10


def forward_step(
    data_iterator: Iterator[Batch] | None, model: GPTModel
) -> tuple[torch.Tensor, Callable]:
    """Run the model on the next micro-batch.

    Returns:
        The model's output (on the last stage the loss of each token, [B, S]) and the function
        that turns it into the loss.
    """
    timers = get_timers()
    stragglers = StragglerDetector()
    timers("batch-generator", log_level=2).start()
    with stragglers(bdata=True):
        batch = _get_batch(data_iterator, get_attr_wrapped_model(model, "vp_stage"))
    timers("batch-generator").stop()
    with stragglers:
        output = model(
            batch["tokens"],
            batch["position_ids"],
            batch["attention_mask"],
            labels=batch["labels"],
            loss_mask=batch["loss_mask"],
        )
    return output, partial(_loss, batch["loss_mask"])


def _get_batch(data_iterator: Iterator[Batch] | None, vp_stage: int | None) -> Batch:
    """This rank's part of the next micro-batch; None for what its pipeline stage does not need."""
    args = get_args()
    has_mtp = args.mtp_num_layers is not None and mtp_on_this_rank(
        mtp_num_layers=args.mtp_num_layers, ignore_virtual=vp_stage is None, vp_stage=vp_stage
    )
    if not (is_first_or_last_pipeline_stage(vp_stage) or has_mtp):
        return dict.fromkeys(_MODEL_INPUTS)
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
        has_cu_seqlens=False,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        broadcast_src_rank=parallel_state.get_tensor_model_parallel_src_rank(),
        broadcast_group=parallel_state.get_tensor_model_parallel_group(),
        cp_size=args.context_parallel_size,
        tp_rank=tp_rank,
        micro_batch_size=args.micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=has_mtp,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=parallel_state.is_pipeline_first_stage(**stage),
        is_pipeline_last_stage=parallel_state.is_pipeline_last_stage(**stage),
    )
    batch = get_batch_on_this_cp_rank(
        batch, is_hybrid_cp=False, cp_group=parallel_state.get_context_parallel_group()
    )
    return {name: batch.get(name) for name in _MODEL_INPUTS}


def _loss(
    loss_mask: torch.Tensor, output: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Sum the loss over the tokens that count.

    Args:
        loss_mask: [B, S], 1 where a token counts.
        output: [B, S], the loss of each token.

    Returns:
        The sum, the number of tokens, and both under the name that is logged.
    """
    mask = loss_mask.view(-1).float()
    loss = torch.sum(output.view(-1).float() * mask)
    num_tokens = mask.sum().to(torch.int)
    _check_loss(loss)
    report = torch.cat((loss.detach().view(1), num_tokens.view(1)))
    return loss, num_tokens, {"lm loss": report}


def _check_loss(loss: torch.Tensor) -> None:
    """Megatron's checks: NaN and Inf end the run, spikes are reported."""
    args = get_args()
    machine = get_rerun_state_machine()
    # A forward pass is deterministic: a rerun must give the very same loss.
    check = partial(machine.validate_result, result=loss, tolerance=0.0)
    if args.check_for_nan_in_loss_and_grad:
        check(rejection_func=torch.isnan, message="NaN in the loss of this rank", fatal=True)
        check(rejection_func=torch.isinf, message="Inf in the loss of this rank", fatal=True)
    if args.check_for_spiky_loss:
        is_spike = partial(machine.is_unexpectedly_large, threshold=_SPIKE, context="loss")
        check(rejection_func=is_spike, message="spike in the loss", fatal=False)
