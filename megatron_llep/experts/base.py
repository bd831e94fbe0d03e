"""What LLEP asks of a layer's experts, whichever way they compute.

Letters: n rows (tokens on this rank after dispatch, sorted by slot) of the native or of the foreign
slots, H hidden size, M native slots, S foreign slots, F <= S foreign experts (other slots get no
token), F <= M.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property, partial
from typing import ClassVar

import torch

from megatron_llep.lending.parcel import Parcel, Weights

Rows = tuple[torch.Tensor, torch.Tensor]
"""Hidden states [n, H], sorted by slot, and the router's weight of each, [n]."""

Borrow = Callable[[torch.Tensor], tuple[torch.Tensor, list[Weights]]]
"""Waits for the foreign weights. Takes the rows [n, H] that foreign experts are to compute, and
returns them with the F experts' weights, by slot: their gradients start home when those of these
rows are known."""


class LendableExperts(ABC):
    """A module of M native experts whose weights can be lent, and that can host foreign ones.

    Natives run as Megatron's module computes them, then foreign experts, on rows of their own. So
    the transfer of foreign weights is hidden behind the natives in forward. In backward autograd
    runs first what came last in forward: the return is hidden behind them as well.
    """

    module_type: ClassVar[type[torch.nn.Module]]
    """Megatron's module of experts that this class lends; not its subclasses."""
    runs_in_fp8: ClassVar[bool] = False
    """Whether it quantises foreign experts as it does natives."""

    def __init__(self, module: torch.nn.Module):
        self.module = module
        self.num_native: int = module.num_local_experts

    @cached_property
    def expert_bytes(self) -> int:
        """Size of what travels of one expert from or to this rank."""
        return Parcel.of(self.weights()[0]).nbytes

    @abstractmethod
    def describe(self) -> list[str]:
        """What an expert is made of, which must be the same on all ranks: some lines.

        Raises:
            ValueError: the M natives are not alike, or some part of them cannot be lent; names it,
                and the way out.
        """

    @property
    def delays_weight_grads(self) -> bool:
        """Whether natives' weight gradients come in the module's `backward_dw`, not in backward.

        Those of foreign experts come in backward.
        """
        return False

    def hooks_held(self) -> AbstractContextManager[None]:
        """Run the weights' gradient hooks at the end, and not within `backward_dw`.

        Of modules whose `backward_dw` runs any.
        """
        return nullcontext()

    def parameter_hooks(self) -> list[Callable[[], object]]:
        """The hooks by which `--overlap-param-gather` waits for a parameter's values.

        Lending reads the weights before the modules' own forward, which would run them.
        """
        return [
            partial(hook, submodule, ())
            for submodule in self._submodules
            for hook in find_gather_hooks(submodule)
        ]

    @cached_property
    def _submodules(self) -> list[torch.nn.Module]:
        """Of the experts; listing them in each forward would take as long as a plan."""
        return list(self.module.modules())

    @abstractmethod
    def weights(self) -> list[Weights]:
        """M tuples of parameters, alike in order, classes, shapes and dtype."""

    def compute(
        self, rows: Sequence[Rows], tokens_per_slot: torch.Tensor, borrow: Borrow
    ) -> list[torch.Tensor]:
        """Run M native and F foreign experts on their tokens.

        Natives run even on no rows: their gradient hooks must fire on every rank.

        Args:
            rows: of the natives, and of the foreign experts.
            tokens_per_slot: int [M + S] on the host; slots beyond M + F hold no expert.
            borrow: called once, when foreign weights are needed and no earlier.

        Returns:
            [n, H] of the natives, and of the foreign experts, each row weighted by its probability.
        """
        (hidden, probs), (foreign_hidden, foreign_probs) = rows
        native, _ = self.module(hidden, tokens_per_slot[: self.num_native], probs)
        foreign_hidden, foreign = borrow(foreign_hidden)
        tokens = tokens_per_slot[self.num_native :].tolist()[: len(foreign)]
        assert sum(tokens) == len(foreign_hidden), "tokens sent to an empty slot"
        if not foreign:  # no rows, but on the way of the gradients
            return [native, foreign_hidden]
        return [native, self.compute_foreign(foreign_hidden, foreign_probs, tokens, foreign)]

    @abstractmethod
    def compute_foreign(
        self,
        hidden: torch.Tensor,
        probs: torch.Tensor,
        tokens: Sequence[int],
        foreign: Sequence[Weights],
    ) -> torch.Tensor:
        """Run F foreign experts on their tokens.

        Args:
            hidden: [n, H], sorted by slot.
            probs: [n].
            tokens: of each foreign expert.
            foreign: F experts' weights, in slot order.

        Returns:
            [n, H], each row weighted by its probability.
        """


def find_gather_hooks(module: torch.nn.Module) -> list[Callable[..., object]]:
    """The forward pre-hooks of Megatron's DDP on a module, which wait for its parameters.

    Those alone: they look at no input, and there may be none to give. A hook of somebody else does
    not expect to run without one.
    """
    return [
        hook
        for hook in module._forward_pre_hooks.values()
        if (getattr(hook, "__module__", None) or "").startswith("megatron.core.distributed.")
    ]
