"""What gloo lacks of the collectives that Megatron calls.

Shape letters: n = rows, which differ from rank to rank; h = columns.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist


def _make_all_gather(all_gather: Callable[..., Any]) -> Callable[..., Any]:
    """Gather lists of unequal shapes [n, h] by padding: gloo takes only equal ones."""

    @functools.wraps(all_gather)
    def call(
        tensor_list: list[torch.Tensor],
        tensor: torch.Tensor,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        largest = max(part.numel() for part in tensor_list)
        if async_op or all(part.shape == tensor_list[0].shape for part in tensor_list):
            return all_gather(tensor_list, tensor, group=group, async_op=async_op)
        padded = tensor.new_zeros(largest)
        padded[: tensor.numel()] = tensor.reshape(-1)
        gathered = [torch.empty_like(padded) for _ in tensor_list]
        all_gather(gathered, padded, group=group)
        for part, flat in zip(tensor_list, gathered, strict=True):
            part.copy_(flat[: part.numel()].view(part.shape))
        return None

    return call


def _to_list(splits: Sequence[int] | torch.Tensor | None) -> list[int] | None:
    return None if splits is None else [int(size) for size in splits]


def _make_all_to_all_single(all_to_all_single: Callable[..., Any]) -> Callable[..., Any]:
    """Take split sizes as tensors: where a GPU is, Megatron has made numpy arrays of them."""

    @functools.wraps(all_to_all_single)
    def call(
        output: torch.Tensor,
        input: torch.Tensor,
        output_split_sizes: Any = None,
        input_split_sizes: Any = None,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        return all_to_all_single(
            output,
            input,
            _to_list(output_split_sizes),
            _to_list(input_split_sizes),
            group=group,
            async_op=async_op,
        )

    return call


def install_collectives() -> None:
    """Replace the two collectives of ``torch.distributed`` that gloo does not carry as they are."""
    module: Any = dist
    module.all_gather = _make_all_gather(dist.all_gather)
    module.all_to_all_single = _make_all_to_all_single(dist.all_to_all_single)
