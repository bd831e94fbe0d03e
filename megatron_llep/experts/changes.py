"""Notices that others put modules around experts, or sharded them, since the last forward.

Adapters (LoRA) may be put around the linears of experts after LLEP was switched on. What is lent of
an expert is found anew then.
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


class SeenExperts:
    """What a layer's experts were made of in the last forward."""

    def __init__(self) -> None:
        self._experts: torch.nn.Module | None = None
        self._seen: list[tuple[dict, str, object]] = []

    def have_changed(self, experts: torch.nn.Module) -> bool:
        """Whether the experts are made of other modules than at the last call; true at the first.

        It looks at the first of the experts, which takes a few dictionary look-ups: whoever changes
        experts changes all of them.
        """
        if experts is self._experts and all(
            held.get(name) is value for held, name, value in self._seen
        ):
            return False
        self._experts, self._seen = experts, _list_first(experts)
        return True


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
