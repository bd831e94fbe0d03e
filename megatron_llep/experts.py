"""Expert compute: native experts as Megatron runs them, then this rank's foreign experts.

Letters: N tokens on this rank after dispatch, sorted by slot, H hidden size, M native slots,
F foreign experts (F <= S foreign slots; the other slots get no token).
"""

import torch
from megatron.core.transformer.moe.experts import SequentialMLP
from torch.func import functional_call

from megatron_llep.lending import Weights


class LendableExperts:
    """Megatron's `SequentialMLP`, seen as M experts whose weights can be lent."""

    def __init__(self, module: SequentialMLP):
        self.module = module
        self._names = tuple(name for name, _ in module.local_experts[0].named_parameters())

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return next(self.module.parameters()).dtype

    @property
    def expert_bytes(self) -> int:
        """Size of one expert's weights on this rank."""
        return sum(weight.nbytes for weight in self.module.local_experts[0].parameters())

    def weights(self) -> list[Weights]:
        """M tuples of parameters, in the order of their names."""
        return [tuple(expert.parameters()) for expert in self.module.local_experts]

    def trains(self) -> bool:
        """Whether any native weight needs a gradient."""
        return any(weight.requires_grad for weight in self.module.parameters())

    def wait_for_parameters(self) -> None:
        """Run the hooks by which `--overlap-param-gather` waits for a parameter's values.

        Lending reads the weights before the modules' own forward, which would run them.
        """
        for expert in self.module.local_experts:
            for submodule in expert.modules():
                for hook in submodule._forward_pre_hooks.values():
                    hook(submodule, ())

    def compute(
        self,
        hidden: torch.Tensor,
        tokens_per_slot: torch.Tensor,
        probs: torch.Tensor,
        foreign: list[Weights],
    ) -> torch.Tensor:
        """Run M native and F foreign experts on their tokens.

        Args:
            hidden: [N, H], sorted by slot, natives first.
            tokens_per_slot: int [M + S] on the host; slots beyond M + F hold no expert.
            probs: [N], the router's weight of each row.
            foreign: F experts' weights, in slot order.

        Returns:
            [N, H], each row weighted by its probability.
        """
        num_native = self.module.num_local_experts
        tokens = tokens_per_slot.tolist()
        # Split once: the gradient of a slice is as large as what it was cut from.
        sizes = [sum(tokens[:num_native]), *tokens[num_native : num_native + len(foreign)]]
        assert sum(sizes) == len(hidden), "tokens sent to an empty slot"
        rows, row_probs = hidden.split(sizes), probs.split(sizes)
        # Natives run even with no token: their gradient hooks must fire on every rank.
        native, _ = self.module(rows[0], tokens_per_slot[:num_native], row_probs[0])
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
