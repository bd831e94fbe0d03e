"""Experts in Transformer Engine's grouped GEMMs: `TEGroupedMLP`, natives, then foreign experts.

Letters: n rows (tokens on this rank after dispatch, sorted by slot), H hidden size, M native and
F <= M foreign experts.

TE's `GroupedLinear` finds its experts by name: weight0 to weight{num_gemms - 1}, biases likewise.
Foreign experts are computed in a second call of the same module, and have these names for as long
as it lasts, as plain attributes, which hide the parameters: `torch.nn.Module` looks for those last.
So the module's state dict and parameters know nothing of them.

Natives and foreign experts do not share a GEMM: TE launches one for each expert anyway, and natives
need not wait for foreign weights then. Of what the two calls share:

- The quantisers of natives serve foreign experts, which are never more. Natives run first, so they
  are there. Those of the recipes that LLEP supports remember nothing; TE uses them for all
  micro-batches in flight.
- The cache of quantised weights is the natives': `is_first_microbatch=None`, by which TE knows that
  it must neither read nor fill it, and must add to `main_grad`, not write over it.
- Quantised weights (`--fp8-param-gather`) each bring a quantiser that says what to keep; TE
  quantises and caches nothing. A lent one's does not ask for columns that are made of rows:
  these are made in backward, which asks for them in any case, and freed with the weight.
- The store of delayed weight gradients (`--delay-wgrad-compute`) is the natives': those of foreign
  experts are due at once, as they travel.
- Recomputed activations: what recomputes them hangs on the output of its own call.
- Offloaded activations (`--offload-modules` expert_fc1, moe_act) are the natives' alone. Megatron
  counts the offloads of a first micro-batch and expects as many ever after, and how many experts
  are borrowed changes. What foreign experts save stays on the GPU.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from megatron.core.extensions.transformer_engine import TEGroupedLinear
from megatron.core.transformer.moe.experts import TEGroupedMLP

from megatron_llep.experts.base import LendableExperts
from megatron_llep.lending.parcel import Weights


class LendableTEGroupedMLP(LendableExperts):
    """One grouped GEMM per linear and direction over the natives, and one over foreign experts."""

    module_type = TEGroupedMLP
    runs_in_fp8 = True

    def __init__(self, module: TEGroupedMLP):
        """See the class.

        Raises:
            ValueError: the linears are not Transformer Engine's.
        """
        super().__init__(module)
        self._linears = (module.linear_fc1, module.linear_fc2)
        for linear in self._linears:
            if TEGroupedLinear is None or not isinstance(linear, TEGroupedLinear):
                raise ValueError(
                    f"--moe-llep: LLEP lends the experts of a TEGroupedMLP made of Transformer "
                    f"Engine's grouped linears, not of {type(linear).__name__}; use Megatron's "
                    "TEColumnParallelGroupedLinear and TERowParallelGroupedLinear"
                )

    def weights(self) -> list[Weights]:
        """M tuples: weight and bias, if any, of the first linear, then of the second."""
        return [
            tuple(
                getattr(linear, f"{kind}{expert}")
                for linear in self._linears
                for kind in _parameter_kinds(linear)
            )
            for expert in range(self.num_native)
        ]

    @property
    def delays_weight_grads(self) -> bool:
        """With `--delay-wgrad-compute`."""
        return any(linear.delay_wgrad_compute for linear in self._linears)

    @contextmanager
    def hooks_held(self) -> Iterator[None]:
        """See the base class. In the order of `TEGroupedMLP.backward_dw`."""
        with ExitStack() as stack:
            for linear in self._linears:
                stack.enter_context(_attributes(linear, wgrad_accumulation_and_reduce_hooks=[]))
            yield
        for linear in reversed(self._linears):
            linear._trigger_wgrad_accumulation_and_reduce_hooks()

    def compute_foreign(
        self,
        hidden: torch.Tensor,
        probs: torch.Tensor,
        tokens: Sequence[int],
        foreign: Sequence[Weights],
    ) -> torch.Tensor:
        """Run F foreign experts on their tokens: [n, H] -> [n, H]."""
        with self._host(foreign):
            # Not the module itself: its hooks ran for the natives, once as in plain Megatron.
            output, _ = self.module.forward(hidden, torch.tensor(tokens), probs)
        return output

    @contextmanager
    def _host(self, foreign: Sequence[Weights]) -> Iterator[None]:
        """Let the module compute F foreign experts, and no others, while this lasts."""
        assert len(foreign) <= self.num_native, "more foreign experts than quantisers"
        tensors = zip(*foreign, strict=True)  # of all experts, in the order of `weights`
        with ExitStack() as stack:
            stack.enter_context(
                _attributes(self.module, offload_expert_fc1=False, offload_moe_act=False)
            )
            for name in ("quantization_padding", "quantization_unpadding"):
                if hasattr(self.module, name):
                    padding = getattr(self.module, name)
                    stack.enter_context(_attributes(padding, num_gemms=len(foreign)))
            for linear in self._linears:
                named = {
                    f"{kind}{slot}": tensor
                    for kind in _parameter_kinds(linear)
                    for slot, tensor in enumerate(next(tensors))
                }
                # Without that cache TE is passed is_first_microbatch=None: see above.
                stack.enter_context(
                    _attributes(
                        linear,
                        num_gemms=len(foreign),
                        disable_parameter_transpose_cache=True,
                        wgrad_store=type(linear.wgrad_store)(),
                        **named,
                    )
                )
            yield


def leave_fused_operations(experts: torch.nn.Module) -> None:
    """Let a `TEGroupedMLP` that was built for TE's fused operations run its linears instead.

    These hold the parameters in both cases. Megatron makes the fused operations of them at the
    first forward, with the weights of the natives for good; foreign experts could not enter. With
    FP8, rows are then padded as the recipe asks, and not to what the fused kernels ask.
    """
    if getattr(experts, "_with_fused_impl", False):
        experts._with_fused_impl = False
        for name in ("quantization_padding", "quantization_unpadding"):
            if hasattr(experts, name):
                getattr(experts, name).align_size = None  # found at the first forward


def _parameter_kinds(linear: torch.nn.Module) -> tuple[str, ...]:
    return ("weight", "bias") if linear.use_bias else ("weight",)


@contextmanager
def _attributes(owner: Any, **values: Any) -> Iterator[None]:
    """Give an object attributes for a while; what it had before comes back, whatever happens."""
    attributes = vars(owner)
    before = {name: attributes[name] for name in values if name in attributes}
    attributes.update(values)
    try:
        yield
    finally:
        for name in values:
            del attributes[name]
        attributes.update(before)
