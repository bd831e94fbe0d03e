"""What LLEP asks of a layer's experts, whichever way they compute.

Letters: N tokens on this rank after dispatch, sorted by slot, H hidden size, M native slots,
F foreign experts (F <= S foreign slots; the other slots get no token).
"""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch

from megatron_llep.lending import Weights


class LendableExperts(ABC):
    """A module of M native experts whose weights can be lent, and that can host foreign ones."""

    module_type: ClassVar[type[torch.nn.Module]]
    """Megatron's module of experts that this class lends; not its subclasses."""
    runs_in_fp8: ClassVar[bool] = False
    """Whether it quantises foreign experts as it does natives."""

    def __init__(self, module: torch.nn.Module):
        self.module = module
        self.num_native: int = module.num_local_experts

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return next(self.module.parameters()).dtype

    @property
    def expert_bytes(self) -> int:
        """Size of one expert's weights on this rank."""
        return sum(weight.nbytes for weight in self.weights()[0])

    def trains(self) -> bool:
        """Whether any native weight needs a gradient."""
        return any(weight.requires_grad for weight in self.module.parameters())

    def wait_for_parameters(self) -> None:
        """Run the hooks by which `--overlap-param-gather` waits for a parameter's values.

        Lending reads the weights before the modules' own forward, which would run them.
        """
        for submodule in self.module.modules():
            for hook in submodule._forward_pre_hooks.values():
                hook(submodule, ())

    @abstractmethod
    def weights(self) -> list[Weights]:
        """M tuples of parameters, alike in order, shapes and dtype."""

    @abstractmethod
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
