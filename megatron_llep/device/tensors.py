"""Tensors that are asked onto a GPU by name stay on the CPU; asked off it, they are copied.

What a GPU run keeps on the host is apart from what it computes with: weights put aside as a
reference, a snapshot that is written while training goes on. So are the copies made here.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._device import _device_constructors

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


def _names_the_host(value: object) -> bool:
    """Only text does: a `torch.device` of the CPU may well be another tensor's, "on the GPU"."""
    return isinstance(value, str) and (value == "cpu" or value.startswith("cpu:"))


def _keep_on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if _is_gpu(kwargs.get("device")):
            kwargs["device"] = CPU
        kwargs.pop("pin_memory", None)  # torch can pin no memory where no GPU reads it
        return function(*args, **kwargs)

    return call


def _make_to(to: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(to)
    def call(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        target = args[0] if args else kwargs.get("device")
        if _is_gpu(target):
            if args:
                args = (CPU, *args[1:])
            else:
                kwargs["device"] = CPU
        result = to(tensor, *args, **kwargs)
        return tensor.clone() if result is tensor and _names_the_host(target) else result

    return call


def _make_as_tensor(as_tensor: Callable[..., Any]) -> Callable[..., Any]:
    """Only a tensor could already be on the GPU; what else is given is copied there."""

    @functools.wraps(as_tensor)
    def call(data: Any, *args: Any, **kwargs: Any) -> Any:
        result = as_tensor(data, *args, **kwargs)
        is_sent = _is_gpu(kwargs.get("device")) and not torch.is_tensor(data)
        return result.clone() if is_sent else result

    return call


def _make_cpu(cpu: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(cpu)
    def call(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        result = cpu(tensor, *args, **kwargs)
        return tensor.clone() if result is tensor else result

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

    ``Tensor.cpu``, and ``Tensor.to`` with the CPU by its name, return a copy, as they do of a
    tensor on a GPU.

    ``torch.compile`` returns its function unchanged: Megatron compiles small pointwise functions
    when it is imported, which on a CPU costs minutes and gains nothing. So does
    ``torch.jit.script``, which would ask for the source of the functions replaced here.
    """
    # torch notes, once and for all, which functions `with torch.device(...)` sends elsewhere: they
    # must be the ones that ours call, or such blocks would do nothing.
    _device_constructors()
    for name in _FACTORIES:
        setattr(torch, name, _keep_on_cpu(getattr(torch, name)))
    torch.as_tensor = _make_as_tensor(torch.as_tensor)
    tensor: Any = torch.Tensor
    tensor.to = _make_to(tensor.to)
    tensor.type = _make_type(tensor.type)
    tensor.cuda = _return_itself
    tensor.cpu = _make_cpu(tensor.cpu)
    tensor.record_stream = _record_stream
    torch.compile = _return_uncompiled
    torch.jit.script = lambda obj, *args, **kwargs: obj
