"""Experts in Transformer Engine's grouped GEMMs: `TEGroupedMLP`, natives, then foreign experts.

Letters: n rows (tokens on this rank after dispatch, sorted by slot), H hidden size, M native and
F <= M foreign experts.

TE's `GroupedLinear` finds its experts by name: weight0 to weight{num_gemms - 1}, biases likewise.
Foreign experts are computed in a second call of the same module, and have these names for as long
as it lasts, as plain attributes, which hide the parameters (`experts.hosting`). Adapters (LoRA)
around the linears are given those of the foreign experts likewise: whose what is says
`experts.te_parts`.

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

import torch
from megatron.core.extensions.transformer_engine import TEGroupedLinear
from megatron.core.transformer.moe.experts import TEGroupedMLP

from megatron_llep.experts.adapters import (
    WAY_OUT,
    check_gradients_add_up,
    describe,
    describe_tensor,
    describe_values,
    find_base_name,
    unwrap,
)
from megatron_llep.experts.base import LendableExperts
from megatron_llep.experts.hosting import attributes
from megatron_llep.experts.te_parts import find_parts
from megatron_llep.lending.parcel import Weights

_LINEARS = ("linear_fc1", "linear_fc2")


class LendableTEGroupedMLP(LendableExperts):
    """One grouped GEMM per linear and direction over the natives, and one over foreign experts."""

    module_type = TEGroupedMLP
    runs_in_fp8 = True

    def __init__(self, module: TEGroupedMLP):
        """See the class.

        Raises:
            ValueError: the linears are not Transformer Engine's, or what is around them is not
                known.
        """
        super().__init__(module)
        self._linears = tuple(unwrap(getattr(module, name)) for name in _LINEARS)
        for linear in self._linears:
            if TEGroupedLinear is None or not isinstance(linear, TEGroupedLinear):
                raise ValueError(
                    f"--moe-llep: LLEP lends the experts of a TEGroupedMLP made of Transformer "
                    f"Engine's grouped linears, not of {type(linear).__name__}; use Megatron's "
                    "TEColumnParallelGroupedLinear and TERowParallelGroupedLinear"
                )
        self._found = find_parts(module, _LINEARS, TEGroupedLinear, self.num_native)
        self._check_adapters()

    def describe(self) -> list[str]:
        """See the base class."""
        check_gradients_add_up(self.module, apart={id(each) for each in self._found.same.values()})
        lines = [
            f"{name}: {line}"
            for name in _LINEARS
            for line in describe(getattr(self.module, name), apart=self._base_name(name))
        ]
        for part in self._found.parts:
            tensor = part.of_natives(self.num_native)[0]
            lines.append(describe_tensor(f"{part.path}.{part.name}", tensor))
        return lines + [describe_values(path, each) for path, each in self._found.same.items()]

    def weights(self) -> list[Weights]:
        """M tuples: of the first linear, then of the second.

        Of each weight and bias, if any, then what adapters around it have for this expert.
        """
        parts = self._found.parts
        return list(zip(*(part.of_natives(self.num_native) for part in parts), strict=True))

    @property
    def delays_weight_grads(self) -> bool:
        """With `--delay-wgrad-compute`."""
        return any(linear.delay_wgrad_compute for linear in self._linears)

    @contextmanager
    def hooks_held(self) -> Iterator[None]:
        """See the base class. In the order of `TEGroupedMLP.backward_dw`."""
        with ExitStack() as stack:
            for linear in self._linears:
                stack.enter_context(attributes(linear, wgrad_accumulation_and_reduce_hooks=[]))
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
        with self._host(foreign, tokens):
            # Not the module itself: its hooks ran for the natives, once as in plain Megatron.
            output, _ = self.module.forward(hidden, torch.tensor(tokens), probs)
        return output

    @contextmanager
    def _host(self, foreign: Sequence[Weights], tokens: Sequence[int]) -> Iterator[None]:
        """Let the module compute F foreign experts, and no others, while this lasts."""
        assert len(foreign) <= self.num_native, "more foreign experts than quantisers"
        with ExitStack() as stack:
            stack.enter_context(
                attributes(self.module, offload_expert_fc1=False, offload_moe_act=False)
            )
            for name in ("quantization_padding", "quantization_unpadding"):
                if hasattr(self.module, name):
                    padding = getattr(self.module, name)
                    stack.enter_context(attributes(padding, num_gemms=len(foreign)))
            for linear in self._found.grouped:
                # Without that cache TE is passed is_first_microbatch=None: see above.
                stack.enter_context(
                    attributes(
                        linear,
                        num_gemms=len(foreign),
                        disable_parameter_transpose_cache=True,
                        wgrad_store=type(linear.wgrad_store)(),
                    )
                )
            for hosting in self._found.host(foreign, tokens):
                stack.enter_context(hosting)
            yield

    def _check_adapters(self) -> None:
        adapted = [name for name in _LINEARS if self._base_name(name) is not None]
        if adapted and self.delays_weight_grads:
            raise ValueError(
                f"--delay-wgrad-compute: experts.{adapted[0]} is a "
                f"{type(getattr(self.module, adapted[0])).__name__}, which has no weight gradients "
                "to compute later; leave the flag out"
            )
        if self._found.shared and self.module.config.fp8:
            raise ValueError(
                f"--fp8-format {self.module.config.fp8}: the experts of a rank share an adapter "
                f"(experts.{self._found.shared[0].path}) which is not the same on other ranks, and "
                "rows that are padded cannot be told apart there; give each expert an adapter of "
                f"its own, or {WAY_OUT}"
            )

    def _base_name(self, name: str) -> str | None:
        return find_base_name(getattr(self.module, name))


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
