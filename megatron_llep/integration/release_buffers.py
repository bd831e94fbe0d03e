"""Give back what lending keeps between steps: for an export, a refit, or another engine."""

from collections.abc import Iterable

import torch

from megatron_llep.integration.llep_layers import find_shared


def release_buffers(model: torch.nn.Module | Iterable[torch.nn.Module]) -> int:
    """Free the buffers of lent experts that outlive a step; the next backward makes them anew.

    That is the slab in which gradients of foreign experts add up. (Foreign weights live from
    forward to backward, and go with the graph.) No other rank is asked, so each may call it when it
    likes, between steps. The memory goes to torch's allocator, which keeps it for this process
    until `torch.cuda.empty_cache()`. Of a model without LLEP there is nothing to free.

    Args:
        model: or its chunks, wrapped or not.

    Returns:
        Bytes that were freed.
    """
    return sum(shared.grad_scratch.release() for shared in find_shared(model))
