"""Peak memory of what a block makes, in bytes of tensors.

On a GPU torch's allocator counts. On a CPU nothing does, so every operation is watched: storages
that are born in the block count from the operation that made them until they are freed, at their
size, whoever holds them: parameters, gradients, activations, what autograd keeps, buffers of
exchanges. Memory that no torch operation makes, such as numpy's, is left out.
"""

import gc
from collections.abc import Callable

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """While it is entered, follows the storages that operations of this thread make.

    On a CPU backward runs in the thread that calls it, so it is followed too.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        """Most bytes alive at once, after any operation."""
        self._known: dict[int, StorageWeakRef] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = {each.untyped_storage()._cdata for each in _tensors((args, kwargs))}
        result = function(*args, **kwargs)
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            if storage._cdata not in given:
                self._known.setdefault(storage._cdata, StorageWeakRef(storage))
        self.peak = max(self.peak, self.alive())
        return result

    def alive(self) -> int:
        """Bytes of what is not freed, each at its present size."""
        self._known = {key: each for key, each in self._known.items() if not each.expired()}
        storages = [torch.UntypedStorage._new_with_weak_ptr(key) for key in self._known]
        return sum(each.nbytes() for each in storages if each is not None)


def measure_peak(work: Callable[[], object]) -> int:
    """Most bytes that tensors made in a call took at once."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with LiveBytes() as live:
        work()
    return live.peak


def _tensors(tree: object) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
