"""Finds where code would wait for a GPU, on a machine that has none.

Tensors are marked as being on the device, and so is whatever is computed from them. Where such a
tensor's values, or a size that depends on them, reach Python, a GPU run would wait. A copy into a
tensor that is not marked counts as well. New tensors are marked if they were asked for with a
device.
"""

import traceback
from collections.abc import Iterable
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Calls in Python that need a tensor's values on the host, and leave no trace in the operators.
_READS = ("cpu", "numpy", "tolist", "__array__")
# Operators whose result, or whose result's shape, the host must wait for.
_WAITING = {
    *("_local_scalar_dense", "nonzero", "masked_select", "bincount", "equal", "is_nonzero"),
    *("_unique2", "unique_dim", "unique_consecutive"),
}
_NOT_THE_CALLER = ("/torch/", "/support/host_reads.py", "/megatron_llep/device/", "/contextlib.py")


class HostReads(TorchDispatchMode):
    """While it is active, notes every read of a marked tensor, in forward and in backward."""

    def __init__(self, on_device: Iterable[torch.Tensor]):
        super().__init__()
        self.found: list[str] = []
        """What read, and the file and line that asked for it."""
        self.collectives: list[str] = []
        """Names of the collectives that were started."""
        self._storages: dict[int, StorageWeakRef] = {}
        self._calls = _Calls(self)
        for tensor in on_device:
            self.mark(tensor)

    def __enter__(self) -> "HostReads":
        self._calls.__enter__()
        return super().__enter__()

    def __exit__(self, *exc_info: Any) -> None:
        super().__exit__(*exc_info)
        self._calls.__exit__(*exc_info)

    def mark(self, tensor: torch.Tensor) -> None:
        """The tensor is on the device."""
        storage = tensor.untyped_storage()
        # The weak reference keeps the address from being used for another storage.
        self._storages.setdefault(storage._cdata, StorageWeakRef(storage))

    def unmark(self, tensor: torch.Tensor) -> None:
        """The tensor is on the host."""
        self._storages.pop(tensor.untyped_storage()._cdata, None)

    def has(self, value: object) -> bool:
        """Whether it is a tensor on the device."""
        return isinstance(value, torch.Tensor) and value.untyped_storage()._cdata in self._storages

    def note(self, what: str) -> None:
        """Remember a read, and who asked for it."""
        for frame in reversed(traceback.extract_stack()):
            if not any(part in frame.filename for part in _NOT_THE_CALLER):
                self.found.append(f"{what} at {frame.filename}:{frame.lineno}")
                return

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        namespace, name = func.name().split(".")[0].split("::")
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if namespace == "c10d":
            self.collectives.append(name)
        if not any(self.has(tensor) for tensor in tensors):
            return func(*args, **kwargs)
        if name == "copy_" and not self.has(args[0]):
            self.note("copy to the host")
            return func(*args, **kwargs)
        by_mask = name in ("index", "index_put_") and any(
            leaf.dtype == torch.bool for leaf in tensors[1:]
        )
        no_size = name == "repeat_interleave" and kwargs.get("output_size") is None
        if name in _WAITING or by_mask or no_size:
            self.note(name)
        result = func(*args, **kwargs)
        written = tensors if namespace == "c10d" else _find_written(func, args)
        for tensor in tree_leaves(result) + written:
            if isinstance(tensor, torch.Tensor):
                self.mark(tensor)
        return result


def run_backward(output: torch.Tensor, grad: torch.Tensor) -> None:
    """As `output.backward(grad)`, in which `HostReads` would not see calls."""
    torch.autograd.graph._engine_run_backward(
        (output,), (grad,), False, False, (), allow_unreachable=True, accumulate_grad=True
    )


class _Calls(TorchFunctionMode):
    """The reads that operators do not show, as a CPU tensor needs none for them."""

    def __init__(self, reads: HostReads):
        super().__init__()
        self._reads = reads

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        to_host = name == "to" and "cpu" in (*args[1:], kwargs.get("device"))
        if not ((name in _READS or to_host) and args and self._reads.has(args[0])):
            result = func(*args, **kwargs)
            if isinstance(kwargs.get("device"), torch.device) and isinstance(result, torch.Tensor):
                self._reads.mark(result)
            return result
        self._reads.note(name)
        result = func(*args, **kwargs)
        if isinstance(result, torch.Tensor):
            result = result.clone()
            self._reads.unmark(result)
        return result


def _find_written(func: Any, args: tuple[Any, ...]) -> list[torch.Tensor]:
    """The arguments that an operator writes to."""
    return [
        value
        for argument, value in zip(func._schema.arguments, args, strict=False)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
