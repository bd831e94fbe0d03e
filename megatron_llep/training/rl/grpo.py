"""GRPO's formulas, on tensors alone.

Letters: n prompts, G answers a prompt, b sequences, s tokens.
"""

import torch

_STD_FLOOR = 1e-4


def get_group_advantages(rewards: torch.Tensor) -> torch.Tensor:
    """How much better than the other answers to its prompt each is, in standard deviations.

    Args:
        rewards: [n, G].

    Returns:
        [n, G]; 0 in a group whose rewards are all the same.
    """
    mean = rewards.mean(dim=1, keepdim=True)
    std = rewards.std(dim=1, keepdim=True, correction=0)
    return (rewards - mean) / (std + _STD_FLOOR)


def get_clipped_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    *,
    lower: float,
    upper: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The clipped surrogate of PPO, of each token.

    Args:
        logprobs: [b, s], of the policy that is trained.
        old_logprobs: [b, s], of the policy that answered.
        advantages: [b], or [b, s].
        lower: the ratio of the two counts down to 1 - lower ...
        upper: ... and up to 1 + upper.

    Returns:
        Loss [b, s], and the ratio [b, s].
    """
    if advantages.dim() == 1:
        advantages = advantages.unsqueeze(1)
    ratio = (logprobs - old_logprobs).exp()
    clipped = ratio.clamp(1 - lower, 1 + upper)
    return -torch.minimum(ratio * advantages, clipped * advantages), ratio


def estimate_kl(logprobs: torch.Tensor, reference_logprobs: torch.Tensor) -> torch.Tensor:
    """Of each token, the estimate of KL(policy | reference) that is never negative ("k3").

    Args:
        logprobs: [b, s], of the policy.
        reference_logprobs: [b, s].

    Returns:
        [b, s].
    """
    difference = reference_logprobs - logprobs
    return difference.exp() - difference - 1


def sum_losses(
    per_token: torch.Tensor, mask: torch.Tensor, *, by_token: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum what a micro-batch adds to the mean loss.

    Args:
        per_token: [b, s].
        mask: [b, s], 1 at the tokens of answers, at least one a sequence.
        by_token: every token weighs the same; otherwise every sequence does, as in GRPO's paper.

    Returns:
        The sum, and the number of tokens or sequences that it is over, int.
    """
    masked = per_token * mask
    if by_token:
        return masked.sum(), mask.sum().to(torch.int)
    means = masked.sum(dim=1) / mask.sum(dim=1)
    return means.sum(), torch.tensor(len(means), dtype=torch.int, device=means.device)
