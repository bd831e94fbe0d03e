"""Megatron's exchange of rows between ranks, while which the host does something else.

Letters: P ranks, n rows that leave this one, m rows that come.

Megatron's own, over gloo, holds up the host until rows are there; over NCCL the current stream
waits for them at once, and whatever waits for that stream does too. Here both wait afterwards.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import all_to_all


def exchange_rows(
    meanwhile: Callable[[], None],
    group: dist.ProcessGroup,
    rows: torch.Tensor,
    received: Sequence[int],
    sent: Sequence[int],
    *,
    use_nccl_stream: bool,
) -> torch.Tensor:
    """As Megatron's `all_to_all`: [n, ...] -> [m, ...].

    Args:
        meanwhile: called when the exchange is launched, before anything waits for it. It may launch
            others, in another group, if all ranks do.
        group: P ranks.
        rows: by the rank they go to.
        received: [P] rows from each rank.
        sent: [P] rows to each rank.
        use_nccl_stream: as for Megatron's, in backward; forward always uses a stream of its own.
    """
    return _ExchangeRows.apply(meanwhile, group, rows, received, sent, use_nccl_stream)


class _ExchangeRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        meanwhile: Callable[[], None],
        group: dist.ProcessGroup,
        rows: torch.Tensor,
        received: Sequence[int],
        sent: Sequence[int],
        use_nccl_stream: bool,
    ) -> torch.Tensor:
        ctx.way_back = (group, sent, received, use_nccl_stream)
        rows = rows.contiguous()
        arrived = rows.new_empty(sum(received), *rows.shape[1:])
        work = dist.all_to_all_single(
            arrived,
            rows,
            output_split_sizes=received,
            input_split_sizes=sent,
            group=group,
            async_op=True,
        )
        meanwhile()
        work.wait()
        return arrived

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        group, sent, received, use_nccl_stream = ctx.way_back
        back = all_to_all(group, grad, sent, received, use_nccl_stream=use_nccl_stream)
        return None, None, back, None, None, None
