"""GRPO's formulas against numbers worked out by hand."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_llep.training.rl.grpo import (
    estimate_kl,
    get_clipped_loss,
    get_group_advantages,
    sum_losses,
)

REWARDS = st.lists(st.floats(-100, 100), min_size=2, max_size=6)


def test_advantages_by_hand():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [3.0, 1.0, 1.0, 3.0], [2.0, 2.0, 2.0, 2.0]])
    advantages = get_group_advantages(rewards)
    half = 0.5 / 0.5001
    assert advantages[0].tolist() == pytest.approx([half, -half, -half, half])
    one = 1 / 1.0001
    assert advantages[1].tolist() == pytest.approx([one, -one, -one, one])
    assert advantages[2].tolist() == [0, 0, 0, 0]


@given(REWARDS)
def test_advantages_of_a_group_are_centred_and_keep_its_order(rewards):
    advantages = get_group_advantages(torch.tensor([rewards], dtype=torch.float64))[0]
    assert abs(advantages.sum().item()) < 1e-6
    for first, a in zip(rewards, advantages.tolist(), strict=True):
        for second, b in zip(rewards, advantages.tolist(), strict=True):
            assert first <= second or a >= b


def test_clipped_loss_by_hand():
    old = torch.tensor([[0.5, 0.5, 0.5], [0.5, 0.5, 0.5]]).log()
    new = torch.tensor([[0.9, 0.55, 0.1], [0.9, 0.55, 0.1]]).log().requires_grad_()
    loss, ratio = get_clipped_loss(new, old, torch.tensor([2.0, -2.0]), lower=0.2, upper=0.3)
    assert ratio[0].tolist() == pytest.approx([1.8, 1.1, 0.2])
    # A good answer gains up to 1.3, a bad one loses down to 0.8; the other way nothing is cut off.
    assert loss[0].tolist() == pytest.approx([-2.6, -2.2, -0.4])
    assert loss[1].tolist() == pytest.approx([3.6, 2.2, 1.6])
    loss.sum().backward()
    assert new.grad[0].tolist() == pytest.approx([0, -2.2, -0.4])
    assert new.grad[1].tolist() == pytest.approx([3.6, 2.2, 0], abs=1e-6)


def test_on_policy_the_gradient_is_that_of_the_logprob_times_the_advantage():
    logprobs = torch.randn(3, 4, requires_grad=True)
    advantages = torch.tensor([1.0, -0.5, 0.0])
    loss, _ = get_clipped_loss(logprobs, logprobs.detach(), advantages, lower=0.1, upper=0.1)
    loss.sum().backward()
    assert torch.allclose(logprobs.grad, -advantages.unsqueeze(1).expand(3, 4))


def test_kl_by_hand():
    policy = torch.tensor([[0.5, 0.2]]).log()
    reference = torch.tensor([[0.25, 0.4]]).log()
    expected = [0.5 - math.log(0.5) - 1, 2 - math.log(2) - 1]
    assert estimate_kl(policy, reference)[0].tolist() == pytest.approx(expected)
    assert estimate_kl(policy, policy)[0].tolist() == [0, 0]


@given(st.lists(st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)), min_size=2, max_size=5))
def test_expected_kl_estimate_is_the_kl(pairs):
    policy, reference = torch.tensor(pairs, dtype=torch.float64).T
    policy, reference = policy / policy.sum(), reference / reference.sum()
    estimate = estimate_kl(policy.log(), reference.log())
    assert (estimate >= -1e-12).all()
    kl = (policy * (policy / reference).log()).sum()
    assert (policy * estimate).sum().item() == pytest.approx(kl.item(), abs=1e-9)


def test_sequences_or_tokens_weigh_the_same():
    losses = torch.tensor([[1.0, 2.0, 3.0], [10.0, 20.0, 30.0]])
    mask = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    loss, number = sum_losses(losses, mask, by_token=False)
    assert (loss.item(), number.item()) == (31.5, 2)
    loss, number = sum_losses(losses, mask, by_token=True)
    assert (loss.item(), number.item()) == (33, 3)
    assert not number.is_floating_point()
