"""Timing experts, and copies of tokens, on all ranks at once.

Shape letters: n tokens, h hidden size, f inner size of an expert.
"""

import itertools
from dataclasses import dataclass

import torch

from megatron_llep.offline.calibration.clock import Clock
from megatron_llep.offline.calibration.fit import ExpertTiming

CACHE_BYTES = 2**28
"""More than what a core or a GPU finds in its caches."""
_MOST_EXPERTS = 64


@dataclass(frozen=True, kw_only=True)
class _Expert:
    """A gated MLP whose weights have gradients, to which each backward adds."""

    fc1: torch.nn.Linear
    fc2: torch.nn.Linear

    @classmethod
    def make(cls, device: torch.device, h: int, f: int, dtype: torch.dtype) -> "_Expert":
        fc1 = torch.nn.Linear(h, 2 * f, bias=False, device=device, dtype=dtype)
        fc2 = torch.nn.Linear(f, h, bias=False, device=device, dtype=dtype)
        for each in (fc1, fc2):
            each.weight.grad = torch.zeros_like(each.weight)
        return cls(fc1=fc1, fc2=fc2)

    @property
    def num_bytes(self) -> int:
        """Of weights and gradients."""
        return 2 * (self.fc1.weight.nbytes + self.fc2.weight.nbytes)


def make_experts(device: torch.device, h: int, f: int, dtype: torch.dtype) -> list[_Expert]:
    """As many as no cache holds, as in a layer: each finds its weights in memory."""
    first = _Expert.make(device, h, f, dtype)
    others = min(max(CACHE_BYTES // first.num_bytes, 1), _MOST_EXPERTS)
    return [first, *(_Expert.make(device, h, f, dtype) for _ in range(others))]


def time_expert(clock: Clock, n: int, experts: list[_Expert]) -> ExpertTiming:
    """One after another of like experts, as one computes n tokens, with its weights' gradients."""
    first = experts[0].fc2.weight
    h, f = first.shape
    hidden = torch.randn(n, h, device=clock.device, dtype=first.dtype, requires_grad=True)
    probs = torch.rand(n, 1, device=clock.device, dtype=first.dtype)
    grad = torch.randn_like(hidden)
    turn = itertools.cycle(experts)
    outputs = []

    def forward() -> None:
        expert = next(turn)
        gate, up = expert.fc1(hidden).chunk(2, dim=-1)
        outputs.append(expert.fc2(torch.nn.functional.silu(gate) * up * probs))

    def backward() -> None:
        outputs.pop().backward(grad)

    forward_seconds, backward_seconds = clock.time(forward, backward)
    return ExpertTiming(
        tokens=n,
        flops_per_token=6 * h * f,
        forward_seconds=forward_seconds,
        backward_seconds=backward_seconds,
    )


def time_copy(clock: Clock, n: int, h: int, dtype: torch.dtype) -> float:
    """Bytes a second of bringing tokens into order, there and back."""
    tokens = torch.randn(n, h, device=clock.device, dtype=dtype)
    order = torch.randperm(n, device=clock.device)
    result = torch.zeros_like(tokens)
    gather, scatter = clock.time(
        lambda: tokens.index_select(0, order), lambda: result.index_add_(0, order, tokens)
    )
    return 2 * tokens.nbytes / (gather + scatter)
