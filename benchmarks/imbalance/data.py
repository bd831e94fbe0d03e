"""Numbers that all ranks make alike: tokens of a step, and weights of a layer.

Letters: P ranks, N tokens of all ranks, T tokens of this rank, E experts, K experts of a token,
H hidden size, F size of an expert.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch

from benchmarks.imbalance.workloads import Routing, Sizes

_OF_TOKENS, _OF_EXPERTS, _OF_ROUTER = 1, 2, 3
_STRIDE = 1_000_003


@dataclass(frozen=True, kw_only=True)
class LayerSizes(Sizes):
    """With the sizes of its weights."""

    hidden: int
    """H."""
    ffn: int
    """F."""

    def __post_init__(self) -> None:
        """As of `Sizes`.

        Raises:
            ValueError: names the flag, its value and the way out.
        """
        super().__post_init__()
        if self.hidden < 8 or self.hidden % 8:
            raise ValueError(f"--hidden {self.hidden}: must be a multiple of 8")
        if self.ffn < 1:
            raise ValueError(f"--ffn {self.ffn}: must be 1 or more")

    @property
    def expert_numbers(self) -> int:
        """Weights of one expert: gate, up and down projection."""
        return 3 * self.hidden * self.ffn


@dataclass(frozen=True, kw_only=True, eq=False)
class StepData:
    """One step's input: of all ranks, and which part is this rank's."""

    routing: Routing
    rank: int
    hidden: torch.Tensor
    """[N, H]."""
    gradient: torch.Tensor
    """[N, H], of the layer's output."""

    @property
    def rows(self) -> slice:
        """This rank's, of N."""
        starts = self.routing.starts
        return slice(int(starts[self.rank]), int(starts[self.rank + 1]))

    @cached_property
    def experts(self) -> torch.Tensor:
        """int64 [N, K]."""
        return torch.from_numpy(self.routing.experts).to(self.hidden.device)

    @cached_property
    def own_hidden(self) -> torch.Tensor:
        """[T, 1, H], as Megatron's layer takes it."""
        return self.hidden[self.rows].unsqueeze(1).clone()

    @cached_property
    def own_gradient(self) -> torch.Tensor:
        """[T, 1, H]."""
        return self.gradient[self.rows].unsqueeze(1).clone()

    @cached_property
    def own_experts(self) -> torch.Tensor:
        """int64 [T, K]."""
        return self.experts[self.rows]

    @cached_property
    def own_map(self) -> torch.Tensor:
        """Bool [T, E]."""
        E = self.routing.num_experts
        chosen = torch.zeros(
            len(self.own_experts), E, dtype=torch.bool, device=self.own_experts.device
        )
        return chosen.scatter_(1, self.own_experts, True)


def make_step(
    routing: Routing, hidden: int, rank: int, *, seed: int, step: int, device: str
) -> StepData:
    """Draw a step's tokens, the same on every rank and whatever the routing is."""
    generator = _seeded(_OF_TOKENS, seed, step)
    shape = (int(routing.tokens_per_rank.sum()), hidden)
    drawn = [torch.randn(shape, generator=generator).to(device) for _ in range(2)]
    return StepData(routing=routing, rank=rank, hidden=drawn[0], gradient=drawn[1])


def make_expert(sizes: LayerSizes, expert: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights of an expert: [2F, H], gate before up, and [H, F]."""
    generator = _seeded(_OF_EXPERTS, seed, expert)
    shapes = ((2 * sizes.ffn, sizes.hidden), (sizes.hidden, sizes.ffn))
    first, second = (torch.randn(shape, generator=generator) / shape[1] ** 0.5 for shape in shapes)
    return first, second


def make_router(sizes: LayerSizes, seed: int) -> torch.Tensor:
    """Weights [E, H] of the router."""
    shape = (sizes.num_experts, sizes.hidden)
    return torch.randn(shape, generator=_seeded(_OF_ROUTER, seed, 0)) / sizes.hidden**0.5


def make_dispatch_probs(data: StepData, seed: int) -> Iterator[torch.Tensor]:
    """Weights of pairs where no router runs: [N, K], each another one, and [T, E] of this rank."""
    shape = data.experts.shape
    # Of whole numbers below 2^24, so that they differ and fp32 holds them exactly.
    order = torch.randperm(shape.numel(), generator=_seeded(_OF_ROUTER, seed, 1))
    weights = ((order + 1).float() / 2**24).view(shape).to(data.hidden.device)
    yield weights
    own = torch.zeros(data.own_map.shape, device=weights.device)
    yield own.scatter_(1, data.own_experts, weights[data.rows])


def _seeded(kind: int, seed: int, number: int) -> torch.Generator:
    return torch.Generator().manual_seed((kind * _STRIDE + seed) * _STRIDE + number)
