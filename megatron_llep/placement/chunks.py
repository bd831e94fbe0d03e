"""Chunks: a source's pairs of one (expert, holder), in the order of physical slots.

Letters: D replicas of an expert (1, unless tokens are spread over replicas), E experts, P ranks,
M native slots a rank, S foreign slots a rank, C chunks, N rows.
"""

import numpy as np
import torch


def order_chunks(
    sends: np.ndarray, slot_of_expert: np.ndarray, slots_per_rank: int, num_replicas: int = 1
) -> np.ndarray:
    """Order the chunks of pairs by physical slot.

    Args:
        sends: int [D * E, P], pairs of this source for each replica of each expert and holder,
            replica-major.
        slot_of_expert: int [P, D * E], the slot that holds the replica on that rank, -1 if none
            does.
        slots_per_rank: M + S.
        num_replicas: D.

    Returns:
        int64 [2, C]: first pair (in expert-major order) and length of each non-empty chunk.
    """
    if num_replicas > 1:
        # Expert-major, as the pairs are.
        rows = np.arange(len(sends)).reshape(num_replicas, -1).T.ravel()
        sends, slot_of_expert = sends[rows], slot_of_expert[:, rows]
    expert, rank = np.nonzero(sends)
    length = sends[expert, rank]
    first = np.cumsum(length) - length
    slot = slot_of_expert[rank, expert]
    assert (slot >= 0).all(), "the plan sends tokens to a rank that does not hold their expert"
    order = np.argsort(rank * slots_per_rank + slot, kind="stable")
    return np.stack((first[order], length[order])).astype(np.int64, copy=False)


def list_rows(chunks: np.ndarray, device: torch.device) -> torch.Tensor:
    """The rows of chunks, one chunk after another, without a host sync.

    Args:
        chunks: int64 [2, C], first row and length of each.
        device: where the rows are to be listed.

    Returns:
        int64 [N].
    """
    first, length = chunks
    num_rows = int(length.sum())
    shift, length = to_device(np.stack((first + length - length.cumsum(), length)), device)
    row = torch.arange(num_rows, device=device)
    return row.add_(shift.repeat_interleave(length, output_size=num_rows))


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """Copy to a device, without holding up the host.

    From pageable memory the host would wait for the copy. Pinned memory is not given out again
    before a copy from it has run: torch's allocator sees to that.
    """
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
