"""One forward step of a GPT or hybrid model, as Megatron's schedules call it.

Letters: B sequences of a micro-batch, S tokens each; packed ones are one of B * S.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel.utils import AbstractSchedulePlan
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.utils import StragglerDetector, get_attr_wrapped_model
from megatron.training import get_args, get_timers

from megatron_llep.training.batch import Batch, get_batch

# How many times the largest loss so far a loss must be for --check-for-spiky-loss to report it.
_SPIKE = 10


def forward_step(
    data_iterator: Iterator[Batch] | None,
    model: GPTModel,
    return_schedule_plan: bool = False,
    *,
    packed: bool = False,
) -> tuple[torch.Tensor | AbstractSchedulePlan, Callable]:
    """Run the model on the next micro-batch.

    Args:
        data_iterator: None where no data is read.
        model: this rank's chunk; or that of a hybrid model, which is asked for no plan.
        return_schedule_plan: whether the schedule runs the model itself, step by step, as under
            `--overlap-moe-expert-parallel-comm`.
        packed: whether sequences are packs, with cu_seqlens.

    Returns:
        The model's output (on the last stage the loss of each token, [B, S]) or the plan of what
        computes it, and the function that turns it into the loss.
    """
    timers = get_timers()
    stragglers = StragglerDetector()
    timers("batch-generator", log_level=2).start()
    with stragglers(bdata=True):
        vp_stage = get_attr_wrapped_model(model, "vp_stage")
        batch, packed_seq_params = get_batch(
            data_iterator, vp_stage, packed=packed, evaluates=not model.training
        )
    timers("batch-generator").stop()
    with stragglers:
        run = model.build_schedule_plan if return_schedule_plan else model
        output = run(
            batch["tokens"],
            batch["position_ids"],
            batch["attention_mask"],
            labels=batch["labels"],
            loss_mask=batch["loss_mask"],
            packed_seq_params=packed_seq_params,
        )
    return output, partial(_loss, batch["loss_mask"])


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
    check_loss(loss)
    report = torch.cat((loss.detach().view(1), num_tokens.view(1)))
    return loss, num_tokens, {"lm loss": report}


def check_loss(loss: torch.Tensor) -> None:
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
