"""Experts one after another: `SequentialMLP`, then this rank's foreign experts.

Letters: N tokens on this rank after dispatch, sorted by slot, H hidden size, M native slots,
F foreign experts (F <= S foreign slots; the other slots get no token).
"""

import torch
from megatron.core.transformer.moe.experts import SequentialMLP
from torch.func import functional_call

from megatron_llep.experts.base import LendableExperts
from megatron_llep.lending import Weights


class LendableSequentialMLP(LendableExperts):
    """A loop over experts; natives run as Megatron runs them."""

    module_type = SequentialMLP

    def __init__(self, module: SequentialMLP):
        super().__init__(module)
        self._names = tuple(name for name, _ in module.local_experts[0].named_parameters())

    def weights(self) -> list[Weights]:
        """M tuples of parameters, in the order of their names."""
        return [tuple(expert.parameters()) for expert in self.module.local_experts]

    def compute(
        self,
        hidden: torch.Tensor,
        tokens_per_slot: torch.Tensor,
        probs: torch.Tensor,
        foreign: list[Weights],
    ) -> torch.Tensor:
        """Run M native and F foreign experts on their tokens: [N, H] -> [N, H]."""
        tokens = tokens_per_slot.tolist()
        # Split once: the gradient of a slice is as large as what it was cut from.
        sizes = [sum(tokens[: self.num_native])]
        sizes += tokens[self.num_native : self.num_native + len(foreign)]
        assert sum(sizes) == len(hidden), "tokens sent to an empty slot"
        rows, row_probs = hidden.split(sizes), probs.split(sizes)
        # Natives run even with no token: their gradient hooks must fire on every rank.
        native, _ = self.module(rows[0], tokens_per_slot[: self.num_native], row_probs[0])
        outputs = [native]
        for slot, weights in enumerate(foreign, start=1):
            outputs.append(self._run_foreign(rows[slot], row_probs[slot], weights))
        return torch.cat(outputs)

    def _run_foreign(
        self, hidden: torch.Tensor, probs: torch.Tensor, weights: Weights
    ) -> torch.Tensor:
        if self.module.config.moe_apply_probs_on_input:
            hidden = (probs.unsqueeze(-1) * hidden).to(hidden.dtype)
            probs = torch.ones_like(probs)
        named = dict(zip(self._names, weights, strict=True))
        output, _ = functional_call(self.module.local_experts[0], named, (hidden, probs))
        return output
