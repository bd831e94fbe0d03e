"""Experts in Transformer Engine's grouped GEMMs: `TEGroupedMLP`, natives and foreign together.

Letters: n rows (tokens on this rank after dispatch, sorted by slot), H hidden size, M native slots,
F foreign experts (F <= S foreign slots; the other slots get no token).

TE's `GroupedLinear` finds its experts by name: weight0 to weight{num_gemms - 1}, biases likewise.
While foreign experts are hosted they have the next names, as plain attributes, and `num_gemms` is
M + F. So they take part in every GEMM, quantiser and bias, forward and backward, but are no
parameters and in no state dict. TE reads from weight0 whether weights need gradients and how they
are accumulated: natives come first.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from megatron.core.extensions.transformer_engine import TEGroupedLinear
from megatron.core.transformer.moe.experts import TEGroupedMLP

from megatron_llep.experts.base import Borrow, LendableExperts, Rows
from megatron_llep.lending.packing import Weights

# What TE makes for each GEMM in forward: quantisers of input, weight and output.
_QUANTIZERS_PER_GEMM = 3


class LendableTEGroupedMLP(LendableExperts):
    """One grouped GEMM per linear and direction, over native and foreign experts."""

    module_type = TEGroupedMLP
    runs_in_fp8 = True
    trains_all_or_none = True  # TE looks at weight0

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

    def parts(self, num_foreign_slots: int) -> tuple[int, ...]:
        """All slots together."""
        return (self.num_native + num_foreign_slots,)

    def compute(
        self, rows: Sequence[Rows], tokens_per_slot: torch.Tensor, borrow: Borrow
    ) -> list[torch.Tensor]:
        """Run M native and F foreign experts on their tokens: [n, H] -> [n, H]."""
        ((hidden, probs),) = rows
        hidden, foreign = borrow(hidden)
        tokens = tokens_per_slot[: self.num_native + len(foreign)]
        assert int(tokens.sum()) == len(hidden), "tokens sent to an empty slot"
        with self._host(foreign):
            output, _ = self.module(hidden, tokens, probs)
        return [output]

    @contextmanager
    def _host(self, foreign: list[Weights]) -> Iterator[None]:
        """Let the module compute M + F experts while this lasts."""
        num_slots = self.num_native + len(foreign)
        slots = range(self.num_native, num_slots)
        remaining = [iter(weights) for weights in foreign]
        with ExitStack() as stack:
            for name in ("quantization_padding", "quantization_unpadding"):
                if hasattr(self.module, name):
                    padding = getattr(self.module, name)
                    stack.enter_context(_attributes(padding, num_gemms=num_slots))
            for linear in self._linears:
                # Without biases TE still wants something under their names.
                named = {f"bias{slot}": linear.bias0 for slot in slots}
                for kind in _parameter_kinds(linear):
                    for slot, weights in zip(slots, remaining, strict=True):
                        named[f"{kind}{slot}"] = next(weights)
                self._forget_cached_weights(linear)
                self._make_quantizers(linear)
                # Without that cache TE is passed is_first_microbatch=None: it adds to main_grad,
                # which may hold gradients that came home, and quantises every weight afresh.
                stack.enter_context(
                    _attributes(
                        linear,
                        num_gemms=num_slots,
                        disable_parameter_transpose_cache=True,
                        **named,
                    )
                )
            yield

    def _forget_cached_weights(self, linear: torch.nn.Module) -> None:
        """Drop FP8 weights of the step before, if this is the first forward of a step.

        Megatron has its linears renew them then, and a lending forward, which uses none, takes the
        place of that forward: a later one of the same step would find the old ones.
        """
        if linear.is_first_microbatch:
            linear._fp8_workspaces.clear()

    def _make_quantizers(self, linear: torch.nn.Module) -> None:
        """Make the quantisers of as many slots as there can ever be, where FP8 is on.

        TE makes them at a linear's first FP8 forward, for the experts it has then, and not again.
        Not just for the slots of now: a recomputed forward must find them made.
        """
        most = 2 * self.num_native
        made = len(linear.quantizers["scaling_fwd"])
        if not self.module.config.fp8 or made >= most * _QUANTIZERS_PER_GEMM:
            return
        linear.fp8_initialized = linear.fp8_meta_tensors_initialized = False
        with _attributes(linear, num_gemms=most):
            linear.init_fp8_metadata(num_gemms=most)  # does nothing where FP8 is off


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
