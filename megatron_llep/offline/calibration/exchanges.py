"""Timing all-to-alls of several ranks, and two of them at once.

Shape letters: P ranks.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist

from megatron_llep.offline.calibration.clock import Clock
from megatron_llep.offline.calibration.fit import TransferTiming


def list_regular(P: int, sizes: Sequence[int]) -> list[np.ndarray]:
    """Exchanges to fit a link to, [P, P] bytes each: of each kind one for each size, ascending.

    With one rank none.
    Every rank sends as much as it receives, the same to and from each of the others; one sends to
    one other; and this one sends half as much back.
    """
    if P == 1:
        return []
    found = [np.full((P, P), size // (P - 1)) * ~np.eye(P, dtype=bool) for size in sizes]
    for back in (0.0, 0.5):
        for size in sizes:
            sent = np.zeros((P, P), dtype=np.int64)
            sent[0, 1], sent[1, 0] = size, int(size * back)
            found.append(sent)
    return found


def list_uneven(P: int, sizes: Sequence[int]) -> list[np.ndarray]:
    """Exchanges such as tokens and lent experts make, [P, P] bytes, one for each size.

    All send to all, but unlike amounts, or only some send to some; the busiest rank sends, or
    receives, so many bytes.
    """
    if P == 1:
        return []
    generator, found = np.random.default_rng(0), []
    for number, size in enumerate(sizes):
        sent = generator.lognormal(sigma=1.0, size=(P, P)) * ~np.eye(P, dtype=bool)
        if number % 2:
            sent *= generator.permutation(P * P).reshape(P, P) % 3 == 0
            sent[number % P, (number + 1) % P] += 1.0  # at least one does
        busiest = max(sent.sum(axis=0).max(), sent.sum(axis=1).max())
        found.append((sent * (size / busiest)).astype(np.int64))
    return found


def time_exchanges(clock: Clock, sent: Sequence[np.ndarray], rounds: int) -> list[TransferTiming]:
    """Time exchanges, [P, P] bytes each, in turns."""
    if not sent:
        return []
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


def find_overlap(clock: Clock, num_bytes: int) -> float:
    """Send one way and the other way at the same time, on groups of their own."""
    _, sent, _ = list_regular(dist.get_world_size(), [num_bytes])
    one, other = (
        _Exchange(
            torch.ones(num_bytes, dtype=torch.uint8, device=clock.device),
            torch.ones(num_bytes, dtype=torch.uint8, device=clock.device),
            way,
            dist.new_group(),
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
