"""Experts one after another: `SequentialMLP`, then this rank's foreign experts.

Letters: n rows (tokens on this rank after dispatch, sorted by slot) of the foreign experts,
H hidden size, M native and F foreign experts.
"""

from collections.abc import Sequence

import torch
from megatron.core.transformer.moe.experts import SequentialMLP
from torch.func import functional_call

from megatron_llep.experts.base import LendableExperts
from megatron_llep.lending.parcel import Weights


class LendableSequentialMLP(LendableExperts):
    """A loop over experts; natives run as Megatron runs them."""

    module_type = SequentialMLP

    def __init__(self, module: SequentialMLP):
        super().__init__(module)
        self._names = tuple(name for name, _ in module.local_experts[0].named_parameters())

    def weights(self) -> list[Weights]:
        """M tuples of parameters, in the order of their names."""
        return [tuple(expert.parameters()) for expert in self.module.local_experts]

    def compute_foreign(
        self,
        hidden: torch.Tensor,
        probs: torch.Tensor,
        tokens: Sequence[int],
        foreign: Sequence[Weights],
    ) -> torch.Tensor:
        """Run F foreign experts on their tokens: [n, H] -> [n, H]."""
        sizes = list(tokens)
        # Split once: the gradient of a slice is as large as what it was cut from.
        parts = zip(hidden.split(sizes), probs.split(sizes), foreign, strict=True)
        return torch.cat([self._run(*part) for part in parts])

    def _run(self, hidden: torch.Tensor, probs: torch.Tensor, weights: Weights) -> torch.Tensor:
        if self.module.config.moe_apply_probs_on_input:
            hidden = (probs.unsqueeze(-1) * hidden).to(hidden.dtype)
            probs = torch.ones_like(probs)
        named = dict(zip(self._names, weights, strict=True))
        output, _ = functional_call(self.module.local_experts[0], named, (hidden, probs))
        return output
