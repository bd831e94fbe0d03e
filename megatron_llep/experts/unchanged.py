"""Refuses experts that others wrapped or sharded: lending would compute something else, silently.

Foreign weights run in the borrower's modules. An adapter (LoRA) put around these after LLEP was
switched on is no part of what is lent, so foreign rows would get the adapter of the wrong expert.
"""

import torch
from torch.distributed.tensor import DTensor

# What FSDP leaves on the modules, and Megatron-FSDP on the parameters, that they manage. They stay
# where weights are gathered for a forward, and so no DTensors.
_MODULE_MARK = "_is_fsdp_managed_module"
_PARAMETER_MARKS = ("__fsdp_param__", "_megatron_fsdp_model", "_mfsdp_parameter_group")


def check_not_sharded(experts: torch.nn.Module) -> None:
    """Refuse experts whose weights FSDP shards.

    Raises:
        ValueError: names the weight or module, and the way out.
    """
    found = [name for name, each in experts.named_modules() if hasattr(each, _MODULE_MARK)]
    found += [name for name, each in experts.named_parameters() if _is_sharded(each)]
    if found:
        raise ValueError(
            f"--moe-llep: FSDP shards the expert weights that LLEP lends ({_join(found[0])}); use "
            "Megatron's DDP with --use-distributed-optimizer"
        )


class UnchangedExperts:
    """What a layer's experts were made of when LLEP was switched on, to compare with in forward."""

    def __init__(self, experts: torch.nn.Module):
        self._types = _list_types(experts)
        self._seen: list[tuple[dict, str, object]] = []

    def check(self, experts: torch.nn.Module) -> None:
        """Refuse experts that are made of something else.

        The first call looks at all modules and parameters. Later ones look at the first of the
        experts, which takes a few dictionary look-ups, and at the rest if that has changed.

        Args:
            experts: the layer's.

        Raises:
            ValueError: names the module and the way out; on all ranks that were changed alike.
        """
        for held, name, value in self._seen:
            if held.get(name) is not value:
                break
        else:
            if self._seen and self._seen[0][2] is experts:
                return
        check_not_sharded(experts)
        types = _list_types(experts)
        for name in {**self._types, **types}:
            before, after = self._types.get(name), types.get(name)
            if before is not after:
                raise ValueError(
                    f"--moe-llep: {_join(name)} was {_name(before)} when LLEP was switched on and "
                    f"is {_name(after)} in this forward; LLEP would lend an expert without what "
                    "was put around it: switch it on later, by convert_model on the model that has "
                    "its adapters"
                )
        self._seen = [({"": experts}, "", experts), *_list_first(experts)]


def _list_types(experts: torch.nn.Module) -> dict[str, type]:
    """Of all modules and parameters, by name."""
    return {
        name: type(each) for name, each in [*experts.named_modules(), *experts.named_parameters()]
    }


def _list_first(experts: torch.nn.Module) -> list[tuple[dict, str, object]]:
    """Of the first expert of each list: where its modules are held, and a parameter of each."""
    first: list[tuple[dict, str, object]] = []
    for path, module in experts.named_modules():
        if _is_first(path):
            first += [(module._modules, *child) for child in module._modules.items()]
            first += [(module._parameters, *each) for each in list(module._parameters.items())[:1]]
    return [each for each in first if _is_first(each[1])]


def _is_first(path: str) -> bool:
    return all(part == "0" or not part.isdigit() for part in path.split("."))


def _is_sharded(parameter: torch.nn.Parameter) -> bool:
    return isinstance(parameter, DTensor) or any(hasattr(parameter, m) for m in _PARAMETER_MARKS)


def _join(name: str) -> str:
    return f"experts.{name}" if name else "experts"


def _name(kind: type | None) -> str:
    return "not there" if kind is None else f"a {kind.__name__}"
