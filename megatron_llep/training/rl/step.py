"""One training forward of GRPO, as Megatron's schedules call it.

Letters: b sequences, s tokens each.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from megatron.training import get_args

from megatron_llep.training.rl.batch import MicroBatch
from megatron_llep.training.rl.grpo import estimate_kl, get_clipped_loss, sum_losses
from megatron_llep.training.rl.replay import start_replay
from megatron_llep.training.step import check_loss


def forward_step(
    data_iterator: Iterator[MicroBatch], model: torch.nn.Module
) -> tuple[torch.Tensor, Callable]:
    """Run the model on the next micro-batch.

    Returns:
        Minus the logprob of each label, [b, s], and the function that turns it into the loss.
    """
    batch = next(data_iterator)
    if batch.routing is not None:
        start_replay(batch.routing)
    output = get_negative_logprobs(model, batch)
    return output, partial(_loss, batch)


def get_negative_logprobs(model: torch.nn.Module, batch: MicroBatch) -> torch.Tensor:
    """Minus the logprob [b, s] of each label, over the whole vocabulary."""
    positions = torch.arange(batch.tokens.shape[1], device=batch.tokens.device)
    return model(batch.tokens, positions.expand_as(batch.tokens), None, labels=batch.labels)


def _loss(
    batch: MicroBatch, output: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Sum the loss over the sequences, or with --calculate-per-token-loss over the tokens.

    Args:
        batch: the micro-batch.
        output: [b, s], minus the logprobs of the labels.

    Returns:
        The sum, the number it is over, and sums and numbers under the names that are logged, which
        are those of Megatron-LM's RL.
    """
    args = get_args()
    assert batch.old_logprobs is not None
    logprobs = -output.float()
    per_token, ratio = get_clipped_loss(
        logprobs,
        batch.old_logprobs,
        batch.advantages,
        lower=args.grpo_clamp_eps_lower,
        upper=args.grpo_clamp_eps_upper,
    )
    add_up = partial(sum_losses, mask=batch.mask, by_token=args.calculate_per_token_loss)
    with torch.no_grad():
        logged = {
            "rl/truncated_from_above": ratio > 1 + args.grpo_clamp_eps_upper,
            "rl/truncated_from_below": ratio < 1 - args.grpo_clamp_eps_lower,
            "rl/pi_over_pi_old_deviation": (ratio - 1).abs(),
        }
    if batch.reference_logprobs is not None:
        kl = estimate_kl(logprobs, batch.reference_logprobs)
        per_token = per_token + args.grpo_kl_beta * kl
        logged["rl/kl_term"] = kl.detach()
    loss, number = add_up(per_token)
    check_loss(loss)
    report = {"lm loss": torch.stack((loss.detach(), number.float()))}
    for name, values in logged.items():
        report[name] = torch.stack((add_up(values.float())[0], number.float()))
    return loss, number, report
