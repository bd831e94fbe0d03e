"""Chunks: pairs or rows that stay together when they are put in another order.

Letters: C chunks, N rows.
"""

import numpy as np
import torch

from megatron_llep.planner import compiled


def list_rows(chunks: np.ndarray, device: torch.device) -> torch.Tensor:
    """The rows of chunks, one chunk after another, without a host sync.

    Args:
        chunks: int64 [2, C], first row and length of each.
        device: where the rows are to be listed.

    Returns:
        int64 [N].
    """
    if device.type == "cpu":
        return torch.from_numpy(compiled("chunks.list_rows")(np.ascontiguousarray(chunks)))
    first, length = chunks
    num_rows, shift = int(length.sum()), first + length - length.cumsum()
    shift, length = to_device(np.stack((shift, length)), device)
    row = torch.arange(num_rows, device=device)
    return row.add_(shift.repeat_interleave(length, output_size=num_rows))


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """Copy to a device, without holding up the host.

    From pageable memory the host would wait for the copy. Pinned memory is not given out again
    before a copy from it has run: torch's allocator sees to that.
    """
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
