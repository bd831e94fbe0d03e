"""Experts whose parameters are quantised (`--fp8-param-gather`), and which of them can be lent."""

import torch

from megatron_llep.lending.parcel import Parcel, can_be_lent


def check_lendable(experts: torch.nn.Module) -> None:
    """Refuse quantised parameters of a class of which it is not known what has to travel.

    Raises:
        ValueError: names the weight, its class and quantiser, or how it is laid out other than its
            class says, and the way out.
    """
    for name, weight in experts.named_parameters():
        if not can_be_lent(weight):
            quantiser = type(getattr(weight, "_quantizer", None)).__name__
            raise ValueError(
                f"--fp8-param-gather: experts.{name} is a {type(weight).__name__} of {quantiser}, "
                "which LLEP does not lend; use --fp8-recipe tensorwise, blockwise or mxfp8, or "
                "leave the flag out"
            )
        try:  # here, for all ranks together: in a forward the others would wait
            Parcel.of((weight,)).flatten((weight,))
        except (AssertionError, AttributeError) as error:
            raise ValueError(
                f"--fp8-param-gather: experts.{name} is no {type(weight).__name__} as LLEP knows "
                f"it ({error}); use Transformer Engine 2.20, or leave the flag out"
            ) from error
