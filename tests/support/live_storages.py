"""How much memory tensors take: of the storages that are born in a block, those still alive."""

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveStorages(TorchDispatchMode):
    """While it is entered, follows the storages of tensors of one dtype that operations make.

    Backward is followed too, as it runs in the thread that calls it where there is no GPU.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.peak = 0
        """The most bytes alive at once after any operation."""
        self._dtype = dtype
        self._known: dict[int, StorageWeakRef] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {x.untyped_storage()._cdata for x in _tensors((args, kwargs))}
        result = function(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            if tensor.dtype == self._dtype and storage._cdata not in given:
                self._known.setdefault(storage._cdata, StorageWeakRef(storage))
        self.peak = max(self.peak, self.alive())
        return result

    def alive(self) -> int:
        """Bytes whose storage still exists, at its present size."""
        self._known = {key: ref for key, ref in self._known.items() if not ref.expired()}
        storages = [torch.UntypedStorage._new_with_weak_ptr(key) for key in self._known]
        return sum(storage.nbytes() for storage in storages if storage is not None)

    def take_peak(self) -> int:
        """The peak since the last call."""
        peak, self.peak = self.peak, self.alive()
        return peak


def _tensors(tree: object) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
