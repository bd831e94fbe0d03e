"""Tensors that are asked onto a GPU by name stay on the CPU."""

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch

from megatron_llep.device.streams import CPU

# The functions of torch that Megatron calls with device="cuda", and their near relatives.
_FACTORIES = (
    *("arange", "as_tensor", "empty", "eye", "full", "linspace", "ones", "rand", "randint"),
    *("randn", "randperm", "tensor", "zeros"),
    *("empty_like", "full_like", "ones_like", "rand_like", "randn_like", "zeros_like"),
)


def _is_gpu(value: object) -> bool:
    if isinstance(value, str):
        return value == "cuda" or value.startswith("cuda:")
    return isinstance(value, torch.device) and value.type == "cuda"


def _keep_on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if _is_gpu(kwargs.get("device")):
            kwargs["device"] = CPU
        return function(*args, **kwargs)

    return call


def _make_to(to: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(to)
    def call(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args and _is_gpu(args[0]):
            args = (CPU, *args[1:])
        elif _is_gpu(kwargs.get("device")):
            kwargs["device"] = CPU
        return to(tensor, *args, **kwargs)

    return call


def _make_type(get_type: Callable[..., Any]) -> Callable[..., Any]:
    """Megatron's optimizers take only parameters whose type is called ``torch.cuda.*Tensor``.

    Only a caller inside Megatron is given that name; everyone else gets the true one.
    """

    @functools.wraps(get_type)
    def call(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        name = get_type(tensor, *args, **kwargs)
        if not isinstance(name, str):
            return name
        if sys._getframe(1).f_globals.get("__name__", "").startswith("megatron.core."):
            return name.replace("torch.", "torch.cuda.", 1)
        return name

    return call


def _return_itself(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return tensor


def _record_stream(tensor: torch.Tensor, stream: object) -> None:
    return None


def _return_uncompiled(model: Callable[..., Any] | None = None, **options: Any) -> Any:
    return model if model is not None else lambda function: function


def install_tensors() -> None:
    """Send factories, ``Tensor.to`` and ``Tensor.cuda`` to the CPU, and compile nothing.

    ``torch.compile`` returns its function unchanged: Megatron compiles small pointwise functions
    when it is imported, which on a CPU costs minutes and gains nothing.
    """
    for name in _FACTORIES:
        setattr(torch, name, _keep_on_cpu(getattr(torch, name)))
    tensor: Any = torch.Tensor
    tensor.to = _make_to(tensor.to)
    tensor.type = _make_type(tensor.type)
    tensor.cuda = _return_itself
    tensor.record_stream = _record_stream
    torch.compile = _return_uncompiled
