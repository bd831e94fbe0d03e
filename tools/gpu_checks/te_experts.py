"""One rank's experts on Transformer Engine's grouped linear, over the same slab.

Shape letters as in experts.py.

As LLEP runs it, natives first, then lent experts, each in a call of its own per linear. A
`GroupedLinear` holds either; its backward adds the weight gradients to the slab's fp32 buffers
(fuse_wgrad_accumulation).
"""

from typing import Any

import torch

from gpu_checks.experts import Activation, Backward, Outputs, Slab


class TransformerEngineExperts:
    """An `Experts` callable; its modules are made once for each part of a slab."""

    def __init__(self) -> None:
        import transformer_engine.pytorch as te

        self._linear = te.GroupedLinear
        self._modules: dict[tuple[int, int], tuple[torch.nn.Module, torch.nn.Module]] = {}

    def __call__(
        self, slab: Slab, rows: torch.Tensor, tokens: list[int], num_native: int
    ) -> tuple[Outputs, Backward]:
        """Forward, and the backward to it."""
        parts = [slice(num_native), slice(num_native, None)][: 1 + bool(tokens[num_native:])]
        sizes = [sum(tokens[part]) for part in parts]
        leaves = [each.detach().requires_grad_() for each in rows.split(sizes)]
        outputs = []
        for part, leaf in zip(parts, leaves, strict=True):
            fc1, fc2 = self._get_modules(slab, part)
            outputs.append(fc2(Activation.apply(fc1(leaf, tokens[part])), tokens[part]))

        def backward(grad: torch.Tensor) -> Outputs:
            for output, part in reversed(list(zip(outputs, grad.split(sizes), strict=True))):
                output.backward(part)
            return [leaf.grad for leaf in leaves if leaf.grad is not None]

        return outputs, backward

    def _get_modules(self, slab: Slab, part: slice) -> tuple[torch.nn.Module, torch.nn.Module]:
        fc1, fc2 = slab.fc1[part], slab.fc2[part]
        key = (fc1.data_ptr(), len(fc1))
        if key not in self._modules:
            self._modules[key] = (
                self._wrap(fc1, slab.fc1_grad[part]),
                self._wrap(fc2, slab.fc2_grad[part]),
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
