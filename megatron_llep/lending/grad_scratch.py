"""One slab of memory for the gradients of foreign experts, which layers use one after another."""

import torch


class GradScratch:
    """Hands out a slab, and keeps it for the next return: one of each device and dtype.

    Of two that are open at once the second has memory of its own; the larger one is kept when both
    are closed.

    Why the next return may write to a slab at once, on the main stream: it was closed after the
    main stream had been made to wait for the last one's exchanges, the last to read it (see
    `WeightLoan`). A slab is allocated on the main stream as well.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[torch.device, torch.dtype], torch.Tensor] = {}

    def open(self, numel: int, *, like: torch.Tensor) -> torch.Tensor:
        """A slab of at least so many numbers, whatever they are, of the device and dtype of `like`.

        One that is too small is freed before a larger one is allocated.
        """
        if numel == 0:
            return like.new_empty(0)
        slab = self._kept.pop((like.device, like.dtype), None)
        if slab is not None and slab.numel() < numel:
            slab = None
        return like.new_empty(numel) if slab is None else slab

    def close(self, slab: torch.Tensor) -> None:
        """Take back a slab that nothing reads or writes any more, on any stream."""
        key = slab.device, slab.dtype
        kept = self._kept.get(key)
        if kept is None or kept.numel() < slab.numel():
            self._kept[key] = slab

    def release(self) -> int:
        """Free what is kept; return its bytes. A slab that is open is kept once it is closed."""
        freed = sum(slab.nbytes for slab in self._kept.values())
        self._kept.clear()
        return freed
