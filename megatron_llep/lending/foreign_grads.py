"""Where the gradients of one loan's foreign experts add up, from backward to their return.

Letters: F foreign experts of this rank in one plan, W numbers in those of one expert's weights that
train.
"""

from collections.abc import Iterable, Sequence

import torch

from megatron_llep.lending.grad_scratch import GradScratch
from megatron_llep.lending.parcel import Weights


class ForeignGrads:
    """[F * W] numbers in fp32 (fp64 for fp64 weights), which take memory only while they are open.

    Kernels that add weight gradients by themselves find them as the weights' `main_grad`, and may
    keep these tensors from forward on. So the tensors are there in forward, in shape, dtype and
    device, each of one number expanded; `open` points them at memory, `close` back.

    It does not hold the weights: the autograd node whose outputs they are holds it.
    """

    def __init__(
        self,
        foreign: Sequence[Weights],
        *,
        dtype: torch.dtype,
        device: torch.device,
        scratch: GradScratch,
    ):
        """Give each weight its `main_grad`; allocate nothing yet.

        Args:
            foreign: F experts' weights, those that train.
            dtype: that weights show, or what they can all be promoted to.
            device: of the weights.
            scratch: where the memory comes from.
        """
        dtype = torch.promote_types(torch.float32, dtype)
        self._nothing = torch.empty(1, dtype=dtype, device=device)
        self._scratch = scratch
        self._slab: torch.Tensor | None = None
        weights = [weight for expert in foreign for weight in expert]
        self._layouts = [(weight.shape, weight.stride()) for weight in weights]
        self._numel = sum(shape.numel() for shape, _ in self._layouts)
        self._main_grads = [self._nothing.new_empty(0) for _ in weights]
        for weight, main_grad in zip(weights, self._main_grads, strict=True):
            weight.main_grad = main_grad
        self._point_at_nothing()

    @property
    def flat(self) -> torch.Tensor:
        """[F * W], one weight after another."""
        assert self._slab is not None, "foreign gradients are open from backward to their return"
        return self._slab[: self._numel]

    def open(self) -> None:
        """Take memory for them, all zero."""
        self.close()  # of a backward that did not come to the return
        self._slab = self._scratch.open(self._numel, like=self._nothing)
        self.flat.zero_()
        offset = 0
        for main_grad, (shape, stride) in zip(self._main_grads, self._layouts, strict=True):
            main_grad.set_(self._slab.untyped_storage(), offset, shape, stride)
            offset += shape.numel()

    def add(self, grads: Iterable[torch.Tensor | None]) -> None:
        """Add gradients that autograd computed, in the order of the weights."""
        for main_grad, grad in zip(self._main_grads, grads, strict=True):
            if grad is not None:
                main_grad.add_(grad)

    def close(self) -> None:
        """Give the memory back, if they are open; nothing may read or write it any more."""
        if self._slab is not None:
            self._point_at_nothing()
            self._scratch.close(self._slab)
            self._slab = None

    def _point_at_nothing(self) -> None:
        storage = self._nothing.untyped_storage()
        for main_grad, (shape, _) in zip(self._main_grads, self._layouts, strict=True):
            main_grad.set_(storage, 0, shape, (0,) * len(shape))
