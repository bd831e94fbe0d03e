"""Adapters (LoRA) around the linears of experts, known by their structure and not by their class.

    Megatron-Bridge  a *wrapper* has `to_wrap`, the linear that it is around, and `adapter`: an
                     adapter, or several in a ModuleDict; each has a `linear_in` and a `linear_out`
    peft, ms-swift   a wrapper has `base_layer`, the linear, and `lora_A` and `lora_B`: modules by
                     the adapter's name

An adapter belongs to its expert: where an expert is lent, its adapters go with it.
"""

import hashlib
from collections.abc import Collection, Iterator
from typing import Any

import torch

from megatron_llep.experts.hosting import attributes

_BASES = ("to_wrap", "base_layer")
_HALVES = ("linear_in", "linear_out")
_HALVES_OF_PEFT = ("lora_A", "lora_B")
# What decides, beside weights, what an adapter computes.
_SETTINGS = ("dim", "alpha", "scaling", "r", "p", "dropout_position", "input_is_parallel")

WAY_OUT = "leave the experts out of the adapters' target modules, or leave --moe-llep out"


def find_base_name(module: torch.nn.Module) -> str | None:
    """The attribute that holds the linear which a wrapper is around; None for other modules."""
    return next((name for name in _BASES if name in module._modules), None)


def unwrap(module: torch.nn.Module) -> torch.nn.Module:
    """The linear that a wrapper is around, or the module itself."""
    name = find_base_name(module)
    return module if name is None else getattr(module, name)


def name_added(wrapper: torch.nn.Module) -> list[str]:
    """The names of a wrapper's own parameters, without those of the linear that it is around."""
    base = f"{find_base_name(wrapper)}."
    return [name for name, _ in wrapper.named_parameters() if not name.startswith(base)]


def check_known(wrapper: torch.nn.Module, path: str) -> None:
    """Check that a wrapper adds low-rank products to what its linear computes, and does no more.

    Only such a one can be given its linear's output, or other weights, by whoever computes many
    experts at once.

    Raises:
        ValueError: names what is not known, and the way out.
    """
    if find_base_name(unwrap(wrapper)) is not None:
        raise ValueError(
            f"--moe-llep: experts.{path}, a {type(wrapper).__name__}, is around another adapter; "
            f"merge that one, {WAY_OUT}"
        )
    for name in name_added(wrapper):
        if not {*_HALVES, *_HALVES_OF_PEFT} & set(name.split(".")):
            raise ValueError(
                f"--moe-llep: experts.{path}, a {type(wrapper).__name__}, has {name}, which is no "
                f"half of a low-rank adapter; use LoRA, {WAY_OUT}"
            )


def find_adapters(
    wrapper: torch.nn.Module,
) -> Iterator[tuple[torch.nn.Module, str, torch.nn.Module]]:
    """The adapters of a wrapper of Bridge's structure: who holds each, its name there, itself."""
    base = unwrap(wrapper)
    for parent in wrapper.modules():
        for name, child in parent._modules.items():
            if child is not None and child is not base and _is_adapter(child):
                yield parent, name, child


def check_gradients_add_up(experts: torch.nn.Module, apart: Collection[int] = ()) -> None:
    """Check that nothing looks at an adapter's gradient before what returns is added to it.

    Args:
        experts: the layer's.
        apart: ids of parameters that do not travel.

    Raises:
        ValueError: names the adapter's weight that has a gradient hook, and the way out.
    """
    for path, module in experts.named_modules():
        if find_base_name(module) is None:
            continue
        for name in name_added(module):
            weight = module.get_parameter(name)
            if weight._backward_hooks and id(weight) not in apart:
                raise ValueError(
                    f"--moe-llep: experts.{path}.{name}, of a {type(module).__name__}, has a "
                    "gradient hook, which would not see the gradients that borrowers of an expert "
                    f"send home; give each expert an adapter of its own without hooks, {WAY_OUT}"
                )


def describe(module: torch.nn.Module, *, apart: str | None = None) -> list[str]:
    """What a module is made of, besides its parameters: a line for each module in it.

    Args:
        module: of an expert.
        apart: name of a module in it that is left out.
    """
    lines = []
    for name, each in module.named_modules():
        if apart is not None and (name == apart or name.startswith(f"{apart}.")):
            continue
        known = {key: vars(each)[key] for key in _SETTINGS if key in vars(each)}
        settings = "".join(f" {key}={value}" for key, value in known.items())
        lines.append(f"{name or 'it'} is a {type(each).__name__}{settings}")
    return lines


def describe_tensor(name: str, tensor: torch.Tensor) -> str:
    """A line on a weight's shape and dtype."""
    return f"{name} is {list(tensor.shape)} in {tensor.dtype}"


def describe_values(name: str, tensor: torch.Tensor) -> str:
    """A line on a weight's values, which are the same on all ranks."""
    if tensor.is_meta:
        return f"{name} has no values yet"
    values = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
    return f"{name} has the values {hashlib.sha256(values.tobytes()).hexdigest()[:16]}"


def run_around(
    wrapper: torch.nn.Module,
    hidden: torch.Tensor,
    output: torch.Tensor,
    weights: dict[str, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Run a wrapper whose linear has computed its output already.

    Args:
        wrapper: around a linear.
        hidden: [n, I].
        output: [n, O] of the linear.
        weights: of another expert, by the names of the wrapper's own parameters.

    Returns:
        [n, O], with what the adapters add.
    """

    def give_output(*_: Any, **__: Any) -> tuple[torch.Tensor, None]:
        return output, None

    base = find_base_name(wrapper)
    assert base is not None
    with attributes(wrapper, **{base: give_output}):
        if weights is None:
            adapted, _ = wrapper(hidden)
        else:
            adapted, _ = torch.func.functional_call(wrapper, weights, (hidden,))
    return adapted


def _is_adapter(module: torch.nn.Module) -> bool:
    return all(half in module._modules for half in _HALVES)
