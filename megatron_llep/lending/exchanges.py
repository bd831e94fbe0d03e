"""The exchanges of one loan: weights to borrowers, and their gradients the same way back.

Letters: P ranks of the expert-parallel group, M native experts a rank, F foreign experts of this
rank in one plan, W numbers in one expert's weights, B units in its parcel, L numbers of this rank's
lent experts.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
import torch.distributed as dist

from megatron_llep.lending.packing import (
    add_pieces,
    count_by_peer,
    find_parts,
    make_buffers,
    pack,
    unpack,
)
from megatron_llep.lending.parcel import Parcel, Weights
from megatron_llep.lending.pending import PendingExchanges
from megatron_llep.lending.shared import SharedLending
from megatron_llep.lending.transfers import Exchange, RankTransfers

Buffers = tuple[torch.Tensor, torch.Tensor]
"""What is sent in an exchange, and what is received."""


class LoanExchanges:
    """Starts a loan's exchanges, and says what is in them."""

    def __init__(
        self,
        *,
        parcel: Parcel,
        fetched: RankTransfers,
        group: dist.ProcessGroup,
        shared: SharedLending,
        note_bytes: Callable[[int, int], None],
    ):
        """See the class.

        Args:
            parcel: what travels of each expert.
            fetched: this rank's transfers, in units of parcels.
            group: the P ranks.
            shared: says on which stream they run.
            note_bytes: called at each exchange with the bytes this rank sends and receives.
        """
        self._parcel = parcel
        self._fetched = fetched
        self._group = group
        self._shared = shared
        self._note_bytes = note_bytes

    @property
    def number(self) -> int:
        """Exchanges that follow each other, each way; the same on every rank."""
        return len(self._fetched.exchanges)

    def start_fetch(self, natives: Sequence[Weights], slots: torch.Tensor) -> PendingExchanges:
        """Start to send those lent of the M natives, and to fill the slots [F * B]."""
        first, *second = self._fetched.exchanges
        buffers = [make_buffers(first, slots, incoming=slots if self._arrives_whole() else None)]
        buffers += [make_buffers(exchange, slots) for exchange in second]
        experts = sorted({piece.expert for piece in first.sends})
        lent = {expert: self._parcel.flatten(natives[expert]) for expert in experts}
        return self._start(self._fetch(lent, slots, buffers), [*buffers, *lent.values()])

    def start_return(
        self,
        grads: torch.Tensor,
        dtype: torch.dtype,
        *,
        returned: RankTransfers,
        width: int,
    ) -> tuple[PendingExchanges, torch.Tensor]:
        """Start to send the gradients of foreign experts home.

        Args:
            grads: [F * W]. Sums of shards take the place of this rank's.
            dtype: in which they travel.
            returned: this rank's transfers, in numbers of the weights: what gradients take back.
            width: W.

        Returns:
            What is in flight, and [L], what it brings: by the pieces that the fetch sends first.
        """
        first, *others = (exchange.reverse() for exchange in returned.exchanges)
        like = grads.new_empty(0, dtype=dtype)
        buffers = [make_buffers(exchange, like) for exchange in others[::-1]]
        as_they_are = self._arrives_whole() and grads.dtype == dtype
        buffers.append(make_buffers(first, like, outgoing=grads if as_they_are else None))
        steps = self._return(grads, buffers, returned, width)
        return self._start(steps, buffers), buffers[-1][1]

    def _start(
        self, steps: Iterator[dist.Work], buffers: Sequence[tuple[torch.Tensor, ...]]
    ) -> PendingExchanges:
        flat = [tensor for each in buffers for tensor in each]
        stream = self._shared.stream_on(flat[0].device)
        return PendingExchanges(steps, flat, stream=stream, progress=self._shared.progress)

    def _fetch(
        self, lent: Mapping[int, Weights], slots: torch.Tensor, buffers: list[Buffers]
    ) -> Iterator[dist.Work]:
        """Pack lent experts, exchange, put what came into the slots; then shards, if any."""
        first, *second = self._fetched.exchanges
        outgoing, incoming = buffers[0]
        width, sizes = self._parcel.width, self._parcel.sizes
        parts = [
            lent[piece.expert][i][where]
            for piece in first.sends
            for i, where in find_parts(piece, sizes)
        ]
        if parts:
            torch.cat(parts, out=outgoing)
        yield self._exchange(first, outgoing, incoming)
        if incoming is not slots:
            unpack(incoming, first.receives, slots, width)
        for exchange, (outgoing, incoming) in zip(second, buffers[1:], strict=True):
            pack(slots, exchange.sends, outgoing, width)
            yield self._exchange(exchange, outgoing, incoming)
            unpack(incoming, exchange.receives, slots, width)

    def _return(
        self, grads: torch.Tensor, buffers: list[Buffers], returned: RankTransfers, width: int
    ) -> Iterator[dist.Work]:
        """The way back of `_fetch`: parts of gradients to those who sum them, then home."""
        first, *others = (exchange.reverse() for exchange in returned.exchanges)
        for exchange, (outgoing, incoming) in zip(others[::-1], buffers[:-1], strict=True):
            pack(grads, exchange.sends, outgoing, width)
            yield self._exchange(exchange, outgoing, incoming)
            add_pieces(incoming, exchange.receives, grads, width)
        outgoing, incoming = buffers[-1]
        if outgoing is not grads:
            pack(grads, first.sends, outgoing, width)
        yield self._exchange(first, outgoing, incoming)

    def _exchange(
        self, exchange: Exchange, outgoing: torch.Tensor, incoming: torch.Tensor
    ) -> dist.Work:
        """Start one all-to-all."""
        num_ranks = self._group.size()
        self._note_bytes(outgoing.nbytes, incoming.nbytes)
        return dist.all_to_all_single(
            incoming,
            outgoing,
            output_split_sizes=count_by_peer(exchange.receives, num_ranks),
            input_split_sizes=count_by_peer(exchange.sends, num_ranks),
            group=self._group,
            async_op=True,
        )

    def _arrives_whole(self) -> bool:
        """Whether this rank borrows no expert in shards: what comes is what the slots hold."""
        return not any(exchange.receives for exchange in self._fetched.exchanges[1:])
