"""One rank's experts on Transformer Engine's grouped linear, over the same slab.

Shape letters as in experts.py.

One `GroupedLinear` per linear holds native and foreign slots alike; its backward adds the weight
gradients to the slab's fp32 buffers (fuse_wgrad_accumulation).
"""

from typing import Any

import torch

from gpu_checks.experts import Activation, Backward, Outputs, Slab


class TransformerEngineExperts:
    """An `Experts` callable; its modules are made once for each slab."""

    def __init__(self) -> None:
        import transformer_engine.pytorch as te

        self._linear = te.GroupedLinear
        self._modules: dict[tuple[int, int], tuple[torch.nn.Module, torch.nn.Module]] = {}

    def __call__(
        self, slab: Slab, rows: torch.Tensor, tokens: list[int], num_native: int
    ) -> tuple[Outputs, Backward]:
        """Forward, and the backward to it."""
        fc1, fc2 = self._get_modules(slab)
        leaf = rows.detach().requires_grad_()
        output = fc2(Activation.apply(fc1(leaf, tokens)), tokens)

        def backward(grad: torch.Tensor) -> Outputs:
            output.backward(grad)
            assert leaf.grad is not None
            return [leaf.grad]

        return [output], backward

    def _get_modules(self, slab: Slab) -> tuple[torch.nn.Module, torch.nn.Module]:
        key = (slab.fc1.data_ptr(), len(slab.fc1))
        if key not in self._modules:
            self._modules[key] = (
                self._wrap(slab.fc1, slab.fc1_grad),
                self._wrap(slab.fc2, slab.fc2_grad),
            )
        return self._modules[key]

    def _wrap(self, weights: torch.Tensor, grads: torch.Tensor) -> torch.nn.Module:
        """A module over the slots' own memory: [G, out, in]."""
        slots, out_features, in_features = weights.shape
        module = self._linear(
            slots,
            in_features,
            out_features,
            bias=False,
            params_dtype=weights.dtype,
            fuse_wgrad_accumulation=True,
            device="meta",
        )
        for slot in range(slots):
            parameter: Any = torch.nn.Parameter(weights[slot])
            parameter.main_grad = grads[slot]
            setattr(module, f"weight{slot}", parameter)
        return module
