"""Forwards in which nothing is lent: where a layer has too little work for lending to pay."""

import contextlib
from collections.abc import Iterable, Iterator

import torch

from megatron_llep.integration.llep_layers import find_shared


@contextlib.contextmanager
def no_lending(model: torch.nn.Module | Iterable[torch.nn.Module]) -> Iterator[None]:
    """Within it the model's LLEP layers run plain expert parallelism.

    For decoding, say, where a layer gets one token a sequence. Each rank tells the others with its
    counts, so nothing is lent as soon as one of the ranks that share tokens is within it. A model
    without LLEP stays as it is.

    Args:
        model: or its chunks, wrapped or not.
    """
    before = [(shared, shared.lends) for shared in find_shared(model)]
    for shared, _ in before:
        shared.lends = False
    try:
        yield
    finally:
        for shared, lends in before:
            shared.lends = lends
