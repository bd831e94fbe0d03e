"""The two linears of each expert of a `SequentialMLP`, and the adapters (LoRA) around them.

For whoever computes the linears of many experts at once: adapters run one by one, by their own
modules, on what was computed.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from megatron.core.transformer.mlp import MLP

from megatron_llep.experts.adapters import (
    check_known,
    find_base_name,
    name_added,
    run_around,
    unwrap,
)
from megatron_llep.lending.parcel import Weights

Around = list[Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]
"""By expert, what its adapters make of its rows [n, I] and the linear's output [n, O] of them."""


class ExpertLinears:
    """Found once, as looking through modules is slow; anew when adapters were added."""

    def __init__(self, experts: Sequence[MLP]):
        """See the class.

        Args:
            experts: M alike.
        """
        self._outer = [(expert.linear_fc1, expert.linear_fc2) for expert in experts]
        self.bases = [(unwrap(fc1), unwrap(fc2)) for fc1, fc2 in self._outer]
        """Of each expert, Megatron's linears."""
        self._added: list[list[str]] = [
            [] if find_base_name(each) is None else name_added(each) for each in self._outer[0]
        ]
        self._is_adapted = [find_base_name(each) is not None for each in self._outer[0]]

    def check_known(self) -> None:
        """Check that the adapters are of a kind that can run on what was computed.

        Raises:
            ValueError: names the adapter, and the way out.
        """
        for number, expert in enumerate(self._outer):
            for name, linear in zip(("linear_fc1", "linear_fc2"), expert, strict=True):
                if find_base_name(linear) is not None:
                    check_known(linear, f"local_experts.{number}.{name}")

    def adapter_weights(self, expert: int) -> Weights:
        """The parameters of one expert's adapters."""
        if not any(self._is_adapted):
            return ()
        return tuple(
            linear.get_parameter(name)
            for linear, names in zip(self._outer[expert], self._added, strict=True)
            for name in names
        )

    def around_natives(self) -> list[Around | None]:
        """Of the first and of the second linear; None where there are no adapters."""
        return [
            [partial(run_around, linear) for linear in linears] if is_adapted else None
            for is_adapted, linears in zip(
                self._is_adapted, zip(*self._outer, strict=True), strict=True
            )
        ]

    def around_foreign(self, experts: Sequence[Weights]) -> list[Around | None]:
        """As `around_natives`, of other experts.

        Args:
            experts: the parameters of each one's adapters, in the order of `adapter_weights`.
        """
        around: list[Around | None] = []
        start = 0
        for is_adapted, linear, names in zip(
            self._is_adapted, self._outer[0], self._added, strict=True
        ):
            stop = start + len(names)
            named = [dict(zip(names, each[start:stop], strict=True)) for each in experts]
            start = stop
            runs: Around = [partial(run_around, linear, weights=weights) for weights in named]
            around.append(runs if is_adapted else None)
        return around
