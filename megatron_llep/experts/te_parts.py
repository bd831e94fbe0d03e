"""Whose the tensors of Transformer Engine's grouped linears are, and of adapters around them.

Letters: M native experts of a rank, F <= M foreign ones.

    numbered   weight0 to weight{M - 1} of a grouped linear: of the experts' own, or of an adapter
    packed     [M, ...] in one parameter of an adapter: expert i has the i-th
    shared     all M experts have one adapter. If nobody sums its gradients over the ranks it is
               another on each rank, and goes with each expert that is lent
    same       as shared, but summed over the ranks of expert parallelism by a gradient hook (as
               Megatron-Bridge has it), and so the same on all of them: it need not travel

Foreign experts are computed by the natives' modules, which have other tensors for that time.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.func import functional_call

from megatron_llep.experts.adapters import (
    WAY_OUT,
    check_known,
    find_adapters,
    find_base_name,
)
from megatron_llep.experts.hosting import attributes
from megatron_llep.lending.parcel import Weights


@dataclass(frozen=True, kw_only=True)
class Part(ABC):
    """A tensor that each expert has, in one of the modules."""

    path: str
    """Of the owner, in the module of all experts."""
    owner: torch.nn.Module
    name: str
    """Of the parameter, in the owner; of numbered ones without the number."""

    @abstractmethod
    def of_natives(self, num_native: int) -> Sequence[torch.Tensor]:
        """The M natives' tensors, to be lent."""

    def host(self, foreign: Sequence[torch.Tensor]) -> list[AbstractContextManager[None]]:
        """What gives the owner the F foreign experts' tensors in the natives' place."""
        return []


class Numbered(Part):
    """See the module."""

    def of_natives(self, num_native: int) -> Sequence[torch.Tensor]:
        """Parameters."""
        return [getattr(self.owner, f"{self.name}{expert}") for expert in range(num_native)]

    def host(self, foreign: Sequence[torch.Tensor]) -> list[AbstractContextManager[None]]:
        """Under the same names."""
        named = {f"{self.name}{slot}": tensor for slot, tensor in enumerate(foreign)}
        return [attributes(self.owner, **named)]


class Packed(Part):
    """See the module."""

    def of_natives(self, num_native: int) -> Sequence[torch.Tensor]:
        """Views of the parameter; their `main_grad`s are views of its own."""
        parameter = getattr(self.owner, self.name)
        views = parameter.unbind()
        main_grad = getattr(parameter, "main_grad", None)
        if main_grad is not None:
            for view, grad in zip(views, main_grad.unbind(), strict=True):
                view.main_grad = grad
        return views

    def host(self, foreign: Sequence[torch.Tensor]) -> list[AbstractContextManager[None]]:
        """Packed, which copies them: they are small."""
        return [attributes(self.owner, **{self.name: torch.stack(tuple(foreign))})]


class Shared(Part):
    """See the module."""

    def of_natives(self, num_native: int) -> Sequence[torch.Tensor]:
        """One parameter M times: what returns for any expert is added to it."""
        return [getattr(self.owner, self.name)] * num_native


@dataclass(frozen=True, kw_only=True)
class SharedAdapter:
    """An adapter that is another on each rank, and one for all experts of a rank."""

    parent: torch.nn.Module
    name: str
    """In the parent."""
    adapter: torch.nn.Module
    parts: Mapping[str, Shared]
    """By the names of the adapter's parameters."""

    @property
    def path(self) -> str:
        """Of its first half, in the module of all experts."""
        return next(iter(self.parts.values())).path

    def host(
        self, foreign: Mapping[Part, Sequence[torch.Tensor]], tokens: Sequence[int]
    ) -> AbstractContextManager[None]:
        """Let its place be taken by a function that runs it on each expert's rows by themselves.

        Args:
            foreign: what the F experts have, by part.
            tokens: of each of them.
        """
        columns = [foreign[part] for part in self.parts.values()]
        experts = [dict(zip(self.parts, each, strict=True)) for each in zip(*columns, strict=True)]

        def run(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            rows = zip(hidden.split(list(tokens)), experts, strict=True)
            return torch.cat(
                [
                    functional_call(self.adapter, weights, (of_expert, *args), kwargs)
                    for of_expert, weights in rows
                ]
            )

        return attributes(self.parent, **{self.name: run})


@dataclass(frozen=True, kw_only=True)
class FoundParts:
    """All that the experts of one module have, each and together."""

    parts: list[Part] = field(default_factory=list)
    """In the order of the modules."""
    grouped: list[torch.nn.Module] = field(default_factory=list)
    """Transformer Engine's grouped linears, also those of adapters."""
    shared: list[SharedAdapter] = field(default_factory=list)
    same: dict[str, torch.nn.Parameter] = field(default_factory=dict)
    """By path."""
    counting: list[torch.nn.Module] = field(default_factory=list)
    """Modules of adapters that say of how many experts they are: `num_local_experts`."""

    def host(
        self, foreign: Sequence[Weights], tokens: Sequence[int]
    ) -> Iterator[AbstractContextManager[None]]:
        """What lets the modules compute foreign experts; settings of grouped linears not among it.

        Args:
            foreign: F experts' weights, in the order of the parts.
            tokens: of each of them.
        """
        by_part = dict(zip(self.parts, zip(*foreign, strict=True), strict=True))
        for part, tensors in by_part.items():
            yield from part.host(tensors)
        for adapter in self.shared:
            yield adapter.host(by_part, tokens)
        for module in self.counting:
            yield attributes(module, num_local_experts=len(foreign))


def find_parts(
    experts: torch.nn.Module,
    linears: Sequence[str],
    grouped_kind: type[torch.nn.Module],
    num_native: int,
) -> FoundParts:
    """Find what belongs to whom in the linears of a module of experts, and in adapters around them.

    Args:
        experts: the module.
        linears: names of its linears, which are Transformer Engine's, or wrappers around such.
        grouped_kind: Transformer Engine's grouped linear.
        num_native: M.

    Raises:
        ValueError: names what is not known around a linear, and the way out.
    """
    found = FoundParts()
    for linear in linears:
        outer = getattr(experts, linear)
        if find_base_name(outer) is not None:
            check_known(outer, linear)
        left: dict[int, Shared] = {}
        for below, module in outer.named_modules(prefix=linear):
            if isinstance(module, grouped_kind):
                found.grouped.append(module)
                kinds = ("weight", "bias") if module.use_bias else ("weight",)
                for kind in kinds:
                    found.parts.append(Numbered(path=below, owner=module, name=kind))
                continue
            if getattr(module, "num_local_experts", None) == num_native:
                found.counting.append(module)
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.dim() == 3 and len(parameter) == num_native:
                    found.parts.append(Packed(path=below, owner=module, name=name))
                else:
                    left[id(parameter)] = Shared(path=below, owner=module, name=name)
        _find_shared(outer, left, found)
    return found


def _find_shared(wrapper: torch.nn.Module, left: dict[int, Shared], found: FoundParts) -> None:
    """Sort out the parameters that all experts of a rank share, given by their ids."""
    for parent, name, adapter in find_adapters(wrapper):
        named = dict(adapter.named_parameters())
        shared = {key: left.pop(id(each)) for key, each in named.items() if id(each) in left}
        same = {
            key: named[key]
            for key in shared
            if named[key].requires_grad and named[key]._backward_hooks
        }
        if len(same) == len(shared):
            _check_seen_by_hooks(shared)
            paths = {f"{shared[key].path}.{shared[key].name}": same[key] for key in same}
            found.same.update(paths)
        elif not same and len(shared) == len(named) and not hasattr(adapter, "num_local_experts"):
            found.parts.extend(shared.values())
            found.shared.append(
                SharedAdapter(parent=parent, name=name, adapter=adapter, parts=shared)
            )
        else:
            path = next(part.path for key, part in shared.items() if key not in same)
            raise ValueError(
                f"--moe-llep: experts.{path}, of a {type(adapter).__name__}, is one for a rank's "
                "experts and another on each rank, unlike other parts of the adapter; share all "
                f"of it or nothing, or {WAY_OUT}"
            )
    for part in left.values():
        raise ValueError(
            f"--moe-llep: experts.{part.path}.{part.name}, of a {type(wrapper).__name__}, belongs "
            f"to no expert and to no adapter that is known; {WAY_OUT}"
        )


def _check_seen_by_hooks(halves: Mapping[str, Shared]) -> None:
    """Check that gradient hooks, which sum an adapter's gradients over the ranks, see them.

    Where they are added to `main_grad` by the kernel that computes them, hooks are called with
    something else, and the ranks' adapters drift apart, in plain Megatron too.
    """
    for part in halves.values():
        names = ("gradient_accumulation_fusion", "fuse_wgrad_accumulation")
        if any(getattr(part.owner, name, False) for name in names):
            raise ValueError(
                f"--moe-llep: experts.{part.path}, a {type(part.owner).__name__}, fuses the "
                "accumulation of gradients that a hook is to sum over the ranks and does not see; "
                f"switch it off (--no-gradient-accumulation-fusion), or {WAY_OUT}"
            )
