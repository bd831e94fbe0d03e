"""Routers that send tokens where a test wants them.

Logits of experts that a token must not choose are lowered. Those of the chosen ones stay what the
router computed, so probabilities are natural and gradients reach the router. The choice depends
on the position in the sequence alone, so it is the same in every layout.

Shape letters: s = sequence (this rank's part), b = micro-batch size, h = hidden size, E = experts,
K = experts per token.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from megatron.core import parallel_state
from megatron.core.transformer.moe.router import TopKRouter

Pattern = Literal["natural", "balanced", "hot", "one_rank", "starved"]
PATTERNS: tuple[Pattern, ...] = ("natural", "balanced", "hot", "one_rank", "starved")

_LOWERED_BY = 30.0


@dataclass(frozen=True)
class Routing:
    """Where tokens go.

    natural: as the router says. balanced: equally to all experts. hot: 95% of the tokens have the
    same expert among their K. one_rank: all to the experts of one rank. starved: none to the
    experts of one rank. Which expert or rank it is changes from layer to layer.
    """

    pattern: Pattern = "natural"
    ranks: int = 2
    """EP size that "one rank" refers to; it need not be the layout's (a single process has 1)."""

    def choose(self, positions: torch.Tensor, layer: int, E: int, K: int) -> torch.Tensor:
        """Experts [s, K] of the tokens at ``positions`` [s]; ``layer`` counts from 0."""
        spread = positions[:, None] * K + torch.arange(K)
        native = E // self.ranks
        if self.pattern == "balanced":
            return spread % E
        if self.pattern == "one_rank":
            assert native >= K
            return layer % self.ranks * native + spread % native
        if self.pattern == "starved":
            return ((layer + 1) * native + spread % (E - native)) % E
        assert self.pattern == "hot"
        # Experts other than the hot one, and the hot one first for 19 tokens of 20.
        hot = 3 * layer % E
        experts = (hot + 1 + spread % (E - 1)) % E
        experts[positions % 20 != 19, 0] = hot
        return experts


def force_routing(chunks: list[torch.nn.Module], routing: Routing) -> None:
    """Let every router of the built model follow ``routing``."""
    if routing.pattern == "natural":
        return
    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, TopKRouter):
                module.gating = functools.partial(_gate, module.gating, module, routing)


def _gate(
    gating: Callable[[torch.Tensor], torch.Tensor],
    router: TopKRouter,
    routing: Routing,
    hidden: torch.Tensor,
) -> torch.Tensor:
    """Logits [s, b, E] of hidden states [s, b, h]."""
    logits = gating(hidden)
    s, _, E = logits.shape
    first = s * parallel_state.get_tensor_model_parallel_rank()
    positions = torch.arange(s)
    if router.config.sequence_parallel:
        positions += first
    experts = routing.choose(positions, router.layer_number - 1, E, router.topk)
    lowered = torch.full((s, E), _LOWERED_BY, dtype=logits.dtype).scatter_(1, experts, 0.0)
    return logits - lowered[:, None, :]
