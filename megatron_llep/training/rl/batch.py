"""Sequences of a rollout as micro-batches.

Letters: b sequences, s tokens each.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_llep.training.rl.replay import Rows, make_rows, pad_routing


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One answer."""

    prompt: list[int]
    answer: list[int]
    advantage: float
    routing: torch.Tensor | None
    """int16 [prompt + answer - 1, L, K] of the rollout, where it is to be replayed."""


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """What one training forward needs; on the device."""

    tokens: torch.Tensor
    """int64 [b, s]"""
    labels: torch.Tensor
    """int64 [b, s]"""
    mask: torch.Tensor
    """float [b, s], 1 where the label is of an answer."""
    advantages: torch.Tensor
    """float [b]"""
    old_logprobs: torch.Tensor | None = None
    """float [b, s], of the labels, by the policy that answered; None before they are computed."""
    reference_logprobs: torch.Tensor | None = None
    """float [b, s], where there is a reference."""
    routing: Rows | None = None
    """What training repeats, if anything."""


def make_micro_batches(
    samples: Sequence[Sample],
    size: int,
    *,
    pad_id: int,
    multiple_of: int,
    num_experts: int,
    sequence_parallel: bool,
) -> list[MicroBatch]:
    """Cut the samples into micro-batches, in order, each as long as its longest.

    Args:
        samples: a multiple of `size`.
        size: b.
        pad_id: fills up the end of shorter ones.
        multiple_of: s is one.
        num_experts: of the model, over which padding is spread where routing is replayed.
        sequence_parallel: whether each tensor-parallel rank routes its own part of the tokens.
    """
    return [
        _make_micro_batch(
            samples[start : start + size], pad_id, multiple_of, num_experts, sequence_parallel
        )
        for start in range(0, len(samples), size)
    ]


def _make_micro_batch(
    samples: Sequence[Sample],
    pad_id: int,
    multiple_of: int,
    num_experts: int,
    sequence_parallel: bool,
) -> MicroBatch:
    longest = max(len(sample.prompt) + len(sample.answer) for sample in samples) - 1
    s = longest + -longest % multiple_of
    ids = torch.full((len(samples), s + 1), pad_id, dtype=torch.int64)
    mask = torch.zeros(len(samples), s)
    routing = []
    for row, sample in enumerate(samples):
        start, end = len(sample.prompt), len(sample.prompt) + len(sample.answer)
        ids[row, :end] = torch.tensor(sample.prompt + sample.answer)
        mask[row, start - 1 : end - 1] = 1
        if sample.routing is not None:
            routing.append(pad_routing(sample.routing, s, num_experts))
    device = torch.cuda.current_device()
    ids = ids.to(device)
    rows = None
    if routing:
        rows = make_rows(torch.stack(routing), sequence_parallel=sequence_parallel)
    return MicroBatch(
        tokens=ids[:, :-1].contiguous(),
        labels=ids[:, 1:].contiguous(),
        mask=mask.to(device),
        advantages=torch.tensor([sample.advantage for sample in samples], device=device),
        routing=rows,
    )
