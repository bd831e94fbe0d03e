"""What travels of an expert: what its parameters hold, as flat tensors, and experts made of it.

Letters: F foreign experts of this rank, W numbers in one expert's weights, B units in its parcel.

A *parcel* is B units of one dtype. Of ordinary weights it is their W numbers, one weight after
another; of weights of several dtypes, as of adapters in fp32 around weights in bf16, the bytes of
these. An expert of which any weight is quantised (Transformer Engine's, `--fp8-param-gather`)
travels as bytes too: the FP8 data and scales, as they are, from which the borrower makes tensors of
the same class. So it computes with the numbers of the home, by rows and by columns:

                            travels                                   the borrower makes
    MXFP8Tensor             rows and columns, data and scales,        nothing
                            each quantised by itself
    Float8BlockwiseQTensor  rows, data and scales                     columns: the same numbers
    Float8Tensor            data, one scale                           the transpose, where TE asks

What is in a parcel follows from class and shape. It must be the same on every rank, and Transformer
Engine may add or drop one of the two directions on some rank, for one micro-batch. What is missing
there travels as NaN (bytes 255: in E4M3, E5M2, E8M0 and fp32), as it is missing for the home's own
GEMMs as well.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Any

import torch
from megatron.core.fp8_utils import is_float8tensor

Weights = tuple[torch.Tensor, ...]

ALIGNMENT = 128
"""Bytes: where a tensor may begin, in a parcel of bytes. GEMMs ask for 16."""


@dataclass(frozen=True, kw_only=True)
class _Field:
    """One tensor in a parcel: an ordinary weight, or an inner tensor of a quantised one."""

    name: str = ""
    """Attribute of the quantised weight."""
    keyword: str = ""
    """Of the constructor of its class."""
    shape: torch.Size
    dtype: torch.dtype
    start: int = 0
    """Its first unit in the parcel."""
    padding: int = 0
    """Units between its last and the next field's first."""

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class _Form:
    """How one weight is taken apart and put together; holds no tensor."""

    fields: tuple[_Field, ...]
    quantised: type[torch.Tensor] | None = None
    """Its class; None for an ordinary weight."""
    arguments: dict[str, Any]
    """Of the class, besides inner tensors and device."""

    def take_apart(self, weight: torch.Tensor) -> list[torch.Tensor | None]:
        """The tensors of the fields; None where a quantised weight has none."""
        if self.quantised is None:
            return [weight.detach()]
        assert type(weight) is self.quantised, "quantised weights of several classes"
        assert not getattr(weight, "_with_gemm_swizzled_scales", False), "swizzled scales"
        return [getattr(weight, field.name) for field in self.fields]

    def put_together(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """The weight over tensors of the fields."""
        if self.quantised is None:
            return tensors[0]
        inner = dict.fromkeys(dict(_inner_tensors(self.quantised)).values())
        inner |= {f.keyword: each for f, each in zip(self.fields, tensors, strict=True)}
        return self.quantised(device=tensors[0].device, **self.arguments, **inner)


@dataclass(frozen=True, kw_only=True)
class Parcel:
    """The layout of what travels of one expert; the same for all experts of a layer."""

    dtype: torch.dtype
    """Of its units."""
    forms: tuple[_Form, ...]
    """Of the expert's weights."""

    @classmethod
    def of(cls, weights: Weights) -> "Parcel":
        """Of one expert, and of all experts like it. Quantised weights must be `lendable`."""
        forms = [_describe(weight) for weight in weights]
        dtypes = {field.dtype for form in forms for field in form.fields}
        as_bytes = any(form.quantised for form in forms) or len(dtypes) > 1
        dtype = torch.uint8 if as_bytes else weights[0].dtype
        start, laid_out = 0, []
        for form in forms:
            fields = []
            for field in form.fields:
                units = field.nbytes // dtype.itemsize
                padding = -units % ALIGNMENT if as_bytes else 0
                fields.append(replace(field, start=start, padding=padding))
                start += units + padding
            laid_out.append(replace(form, fields=tuple(fields)))
        return cls(dtype=dtype, forms=tuple(laid_out))

    @property
    def is_quantised(self) -> bool:
        """Whether any of the expert's weights is."""
        return any(form.quantised for form in self.forms)

    @cached_property
    def sizes(self) -> list[int]:
        """Units of the tensors that `flatten` returns."""
        return [
            units
            for form in self.forms
            for field in form.fields
            for units in (field.nbytes // self.dtype.itemsize, field.padding)
            if units
        ]

    @cached_property
    def width(self) -> int:
        """B."""
        return sum(self.sizes)

    @property
    def nbytes(self) -> int:
        """Size of a parcel in bytes."""
        return self.width * self.dtype.itemsize

    @torch.no_grad()
    def flatten(self, weights: Weights) -> Weights:
        """An expert's parcel, as flat tensors that follow each other; views as far as can be."""
        flat = []
        for form, weight in zip(self.forms, weights, strict=True):
            for field, held in zip(form.fields, form.take_apart(weight), strict=True):
                if held is None:
                    held = torch.full(
                        (field.nbytes,), 255, dtype=torch.uint8, device=weight.device
                    ).view(field.dtype)
                assert (held.numel(), held.dtype) == (prod(field.shape), field.dtype), (
                    f"{field.name} of an expert's weight is {held.dtype} {tuple(held.shape)}, not "
                    f"{field.dtype} {tuple(field.shape)}"
                )
                flat.append(held.reshape(-1).view(self.dtype))
                if field.padding:
                    flat.append(flat[-1].new_zeros(field.padding))
        return tuple(flat)

    def split(self, slots: torch.Tensor) -> list[Weights]:
        """Make the weights of F experts over their parcels, [F * B] units, without copying.

        They are tensors over one storage rather than views, so that an autograd node may return
        them as outputs of their own, and freeing the storage frees them all.
        """

        def find(field: _Field, first: int) -> torch.Tensor:
            start = (first + field.start) * self.dtype.itemsize // field.dtype.itemsize
            empty = slots.new_empty(0, dtype=field.dtype)
            return empty.set_(slots.untyped_storage(), start, field.shape)

        return [
            tuple(
                form.put_together([find(field, first) for field in form.fields])
                for form in self.forms
            )
            for first in range(0, slots.numel(), self.width)
        ]


def can_be_lent(weight: torch.Tensor) -> bool:
    """Whether a weight is ordinary, or of a quantised class that is known here."""
    return not is_float8tensor(weight) or _find_directions(weight) is not None


def drop_derived(weight: torch.Tensor) -> None:
    """Free what a borrower's weight holds besides what travelled."""
    if is_float8tensor(weight) and _find_directions(weight) == (True, False):
        weight.update_usage(rowwise_usage=True, columnwise_usage=False)


def _find_directions(weight: torch.Tensor) -> tuple[bool, bool] | None:
    """Whether rows and columns of a quantised weight travel; None if its class is not known."""
    from transformer_engine.pytorch import tensor as te

    directions = {
        (te.Float8Tensor, te.Float8CurrentScalingQuantizer): (True, False),
        (te.Float8BlockwiseQTensor, te.Float8BlockQuantizer): (True, False),
        (te.MXFP8Tensor, te.MXFP8Quantizer): (True, True),
    }
    if not getattr(weight, "_is_2D_scaled", True):  # columns have scales of their own
        return None
    return directions.get((type(weight), type(weight._quantizer)))


def _describe(weight: torch.Tensor) -> _Form:
    """The form of a weight, whose fields are not yet laid out."""
    if not is_float8tensor(weight):
        return _Form(fields=(_Field(shape=weight.shape, dtype=weight.dtype),), arguments={})
    directions = _find_directions(weight)
    assert directions is not None, "refused when LLEP was switched on"
    # Borrowers make columns in backward alone: TE asks for them there, whatever is said here.
    quantiser = weight._quantizer.copy()
    quantiser.set_usage(rowwise=directions[0], columnwise=directions[1])
    specs = quantiser.inner_tensor_specs(tuple(weight.shape))
    keywords = dict(_inner_tensors(type(weight)))
    arguments = {
        keyword: value
        for keyword, value in weight.get_metadata().items()
        if keyword not in keywords.values()
    }
    arguments |= {"shape": weight.shape, "dtype": weight.dtype, "quantizer": quantiser}
    return _Form(
        fields=tuple(
            _Field(name=name, keyword=keywords[name], shape=torch.Size(shape), dtype=dtype)
            for name, (shape, dtype) in specs.items()
        ),
        quantised=type(weight),
        arguments=arguments,
    )


def _inner_tensors(quantised: type[torch.Tensor]) -> tuple[tuple[str, str], ...]:
    """Attributes of a quantised class, and the constructor's keyword of each."""
    return quantised._INNER_TENSORS
