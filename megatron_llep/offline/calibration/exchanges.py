"""Timing all-to-alls of several ranks, and two of them at once.

Shape letters: P ranks.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist

from megatron_llep.offline.calibration.clock import Clock
from megatron_llep.offline.calibration.fit import LinkTimings, TransferTiming
from megatron_llep.offline.calibration.group import LIMIT
from megatron_llep.offline.calibration.reach import Reach


def list_regular(reach: Reach, sizes: Sequence[int]) -> list[np.ndarray]:
    """Exchanges to fit a link to, [P, P] bytes each: of each kind one for each size, ascending.

    Every rank sends as much as it receives, the same to and from each that it may; those that lead
    send one way; and these get half as much back. None where nobody may send.
    """
    if reach.is_empty:
        return []
    ranks = np.arange(len(reach.next_to))
    found = [size // reach.allowed[0].sum() * reach.allowed for size in sizes]
    leads, led = ranks[reach.leads], reach.next_to[reach.leads]
    for back in (0.0, 0.5):
        for size in sizes:
            sent = np.zeros_like(found[0])
            sent[leads, led], sent[led, leads] = size, int(size * back)
            found.append(sent)
    return found


def list_uneven(reach: Reach, sizes: Sequence[int]) -> list[np.ndarray]:
    """Exchanges such as tokens and lent experts make, [P, P] bytes, one for each size.

    All send to all that they may, but unlike amounts, or only some send to some; the busiest rank
    sends, or receives, so many bytes.
    """
    if reach.is_empty:
        return []
    P = len(reach.next_to)
    generator, found = np.random.default_rng(0), []
    for number, size in enumerate(sizes):
        sent = generator.lognormal(sigma=1.0, size=(P, P)) * reach.allowed
        if number % 2:
            sent *= generator.permutation(P * P).reshape(P, P) % 3 == 0
            sent[number % P, reach.next_to[number % P]] += 1.0  # at least one does
        busiest = max(sent.sum(axis=0).max(), sent.sum(axis=1).max())
        found.append((sent * (size / busiest)).astype(np.int64))
    return found


def time_link(clock: Clock, reach: Reach, sizes: Sequence[int], rounds: int) -> LinkTimings | None:
    """Time both lists of a link's exchanges together; None where nobody may send."""
    if reach.is_empty:
        return None
    regular = list_regular(reach, sizes)
    timings = time_exchanges(clock, [*regular, *list_uneven(reach, sizes)], rounds)
    return LinkTimings(regular=timings[: len(regular)], uneven=timings[len(regular) :])


def time_exchanges(clock: Clock, sent: Sequence[np.ndarray], rounds: int) -> list[TransferTiming]:
    """Time exchanges, [P, P] bytes each, in turns."""
    rank = dist.get_rank()
    # One pair of buffers, written, so that they are not all the one page of zeros.
    outgoing, incoming = (
        torch.ones(
            max(int(each[rank].sum()) for each in ways), dtype=torch.uint8, device=clock.device
        )
        for ways in (sent, [each.T for each in sent])
    )
    exchanges = [_Exchange(outgoing, incoming, each) for each in sent]
    seconds = clock.time_in_turns([each.run for each in exchanges], rounds)
    return [
        TransferTiming(sent=each, seconds=taken) for each, taken in zip(sent, seconds, strict=True)
    ]


def find_overlap(clock: Clock, reach: Reach, num_bytes: int) -> float:
    """Send one way and the other way at the same time, on groups of their own.

    Returns:
        As in the cost model.
    """
    _, sent, _ = list_regular(reach, [num_bytes])
    one, other = (
        _Exchange(
            torch.ones(num_bytes, dtype=torch.uint8, device=clock.device),
            torch.ones(num_bytes, dtype=torch.uint8, device=clock.device),
            way,
            dist.new_group(timeout=LIMIT),
        )
        for way in (sent, sent.T)
    )

    def both() -> None:
        for work in [one.start(), other.start()]:
            work.wait()

    alone, alone_too, together = clock.time(one.run, other.run, both)
    best = max(alone, alone_too)
    return min(max((alone + alone_too - together) / (alone + alone_too - best), 0.0), 1.0)


class _Exchange:
    """An all-to-all of [P, P] bytes, from the begin of one buffer to that of another."""

    def __init__(
        self,
        outgoing: torch.Tensor,
        incoming: torch.Tensor,
        sent: np.ndarray,
        group: dist.ProcessGroup | None = None,
    ):
        rank = dist.get_rank()
        self._sends, self._receives = sent[rank].tolist(), sent[:, rank].tolist()
        self._outgoing = outgoing[: sum(self._sends)]
        self._incoming = incoming[: sum(self._receives)]
        self._group = group

    def run(self) -> None:
        """Start, and wait for the end."""
        self.start().wait()

    def start(self) -> dist.Work:
        """Start; whoever does waits."""
        work = dist.all_to_all_single(
            self._incoming,
            self._outgoing,
            self._receives,
            self._sends,
            group=self._group,
            async_op=True,
        )
        assert work is not None
        return work
