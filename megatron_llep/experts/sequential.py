"""Experts one after another: `SequentialMLP`, then this rank's foreign experts.

Letters: n rows (tokens on this rank after dispatch, sorted by slot) of the foreign experts,
H hidden size, M native and F foreign experts.
"""

from collections.abc import Sequence

import torch
from megatron.core.transformer.moe.experts import SequentialMLP
from torch.func import functional_call

from megatron_llep.experts.adapters import check_gradients_add_up, describe, describe_tensor
from megatron_llep.experts.base import LendableExperts
from megatron_llep.lending.parcel import Weights


class LendableSequentialMLP(LendableExperts):
    """A loop over experts; natives run as Megatron runs them.

    A foreign expert runs in the modules of a native one, whatever is around its linears: adapters
    of any kind, if all that tells experts apart are parameters.
    """

    module_type = SequentialMLP

    def __init__(self, module: SequentialMLP):
        super().__init__(module)
        self._names = tuple(name for name, _ in module.local_experts[0].named_parameters())
        # Looked up once: to iterate over modules in each forward would hold up the counts.
        self._held = [
            [_find_holder(expert, name) for name, _ in expert.named_parameters()]
            for expert in module.local_experts
        ]

    def describe(self) -> list[str]:
        """See the base class."""
        check_gradients_add_up(self.module)
        return describe_alike(self.module.local_experts)

    def weights(self) -> list[Weights]:
        """M tuples of parameters, in the order of their names."""
        return [tuple(held[name] for held, name in expert) for expert in self._held]

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


def describe_alike(experts: Sequence[torch.nn.Module]) -> list[str]:
    """What each of some experts, which must be alike, is made of.

    Raises:
        ValueError: names the first part in which two differ, or a buffer, and the way out.
    """
    first, *others = (_describe_one(expert) for expert in experts)
    for number, expert in enumerate(others, start=1):
        length = max(len(first), len(expert))
        padded = [each + ["nothing more"] * (length - len(each)) for each in (first, expert)]
        for one, other in zip(*padded, strict=True):
            if one != other:
                raise ValueError(
                    f"--moe-llep: the experts of a layer are not alike: in "
                    f"experts.local_experts.0 {one}, in experts.local_experts.{number} {other}, so "
                    "one cannot be computed in the place of another; give all of them the same "
                    "dtype, and the same adapters or none"
                )
    for name, _ in experts[0].named_buffers():
        raise ValueError(
            f"--moe-llep: experts.local_experts.0.{name} is a buffer, and only parameters go with "
            "an expert that is lent; leave out what put it there, or leave --moe-llep out"
        )
    return first


def _find_holder(expert: torch.nn.Module, path: str) -> tuple[dict, str]:
    """What holds a parameter, and its name there."""
    owner, _, name = path.rpartition(".")
    return expert.get_submodule(owner)._parameters, name


def _describe_one(expert: torch.nn.Module) -> list[str]:
    weights = [describe_tensor(name, weight) for name, weight in expert.named_parameters()]
    return describe(expert) + weights
