"""How an expert reaches several borrowers: whole, by one send each, or in shards.

Letters: W numbers in an expert's weights, k ranks that borrow it, B bytes a second of a link.

*Direct*: the home sends W to each of the k. *Scatter-gather*: it sends a shard of about W / k to
each, and the borrowers then send each other theirs, in a second exchange after the first. Gradients
take the same way back: borrowers send each other shards of their gradients, each adds up its own
shard over the borrowers, and sends the sum home. Numbers that cross one rank's link, each way:

                      home sends    borrower receives    borrower sends    one after another
    direct            k W           W                    0                 k W
    scatter-gather    W             W                    (k-1)/k W         W + (k-1)/k W < 2 W

So shards save (k - 2 + 1/k) W / B seconds where the home's link is the bottleneck (W/2 for two
borrowers, 4/3 W for three, about k W for many), less one more exchange's latency for all ranks. In
total the same number of bytes crosses.
"""

from typing import Any

SCATTER_FROM = 3
"""For two borrowers the saving is small: a second exchange, in which every rank of the group takes
part, costs about as much for experts of usual size inside a node."""

ALIGNMENT = 64
"""Shards begin at a multiple of so many numbers, as GPUs copy and send aligned data faster."""


def travel_in_shards(num_borrowers: Any, scatter_from: int) -> Any:
    """Whether experts of so many borrowers, a number or an array, go in shards; 0: none do."""
    return (num_borrowers >= scatter_from) & (scatter_from > 0)


def cut_shards(width: int, num_shards: int) -> list[int]:
    """Where the shards of W = `width` numbers begin, then W; the last ones may be smaller.

    Piece i is [result[i], result[i + 1]).
    """
    step = -(-width // (num_shards * ALIGNMENT)) * ALIGNMENT
    return [min(shard * step, width) for shard in range(num_shards + 1)]
