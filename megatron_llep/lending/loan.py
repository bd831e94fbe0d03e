"""A loan: the buffers and exchanges of one layer's lending for one micro-batch.

Letters: P ranks of the expert-parallel group, M native experts a rank, F foreign experts of this
rank in one plan, W numbers in one expert's weights.

On a GPU packing, exchanges and unpacking run on a side stream. Why this is safe:

- Every buffer is allocated on the main stream (the current one of the caller) before the side
  stream starts to use it, and `SideStream.begin` lets the side stream wait for all that the main
  stream has by then. So whatever had the memory before is done with it, and weights that the last
  optimizer step or parameter gather wrote are in place when they are packed.
- Every transfer is finished: `lend`, `Settle` and `Gate` make the main stream wait for it, before
  they use what came, and before any buffer is let go of. So memory goes back to the main stream,
  whose allocations follow the side stream by then: no `record_stream` is needed, which would hold
  memory back until the device gets there. This is true of storages that are freed and allocated
  again (`resize_`) as well: it is done on the main stream.
- So the main stream is also behind the packing before anything can write the weights again: the
  next optimizer step comes after all of these.
- NCCL runs on a stream of its own, which waits for the current one at the call, and for which the
  current one waits at `Work.wait`: both are the side stream. Buffers are held until `join`, by the
  PendingExchanges, whatever the process group holds.
- Foreign weights are read, and gradients written, by the main stream only, `main_grad` too.
- autograd runs a node's backward on the stream of its forward: the main stream here as well.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
import torch.distributed as dist

from megatron_llep.lending.memory import ForeignMemory
from megatron_llep.lending.packing import (
    Weights,
    count_by_peer,
    count_numbers,
    find_parts,
    make_buffers,
    pack,
    split_experts,
    split_pieces,
    sum_shards,
    unpack,
)
from megatron_llep.lending.pending import PendingExchanges
from megatron_llep.lending.progress import Progress
from megatron_llep.lending.ranges import step
from megatron_llep.lending.side_stream import SideStream
from megatron_llep.lending.transfers import Exchange, Piece, RankTransfers
from megatron_llep.planner import Plan


class WeightLoan:
    """Foreign weights and their gradients, and the transfer in flight, if any.

    It must never hold the tensors that `hand_out` returned: as outputs of an autograd node whose
    context holds the loan, they would be a cycle that Python cannot collect.
    """

    def __init__(
        self,
        plan: Plan,
        natives: Sequence[Weights],
        *,
        group: dist.ProcessGroup,
        scatter_from: int,
        grad_dtype: torch.dtype,
        returns: bool,
        refetch: bool,
        memory: ForeignMemory,
        stream: SideStream,
        progress: Progress,
        note_bytes: Callable[[int, int], None],
    ):
        """Prepare the buffers; `start_fetch` sends lent experts off, `lend` waits for them.

        Args:
            plan: this micro-batch's plan, the same on every rank.
            natives: M tuples of this rank's expert weights, alike in shapes and dtype on all ranks.
            group: the P ranks; used for nothing else, so that lending overlaps token exchange.
            scatter_from: borrowers from which on an expert goes in shards; 0: none does.
            grad_dtype: dtype in which the gradients return.
            returns: whether any rank needs gradients back; the same on every rank.
            refetch: whether to free foreign weights after forward and lend them again in backward;
                the same on every rank.
            memory: counts the foreign weights of this rank.
            stream: where transfers run.
            progress: tells in errors where this rank was.
            note_bytes: called at each exchange with the bytes this rank sends and receives.
        """
        self._shapes = tuple(weight.shape for weight in natives[0])
        self._width = sum(shape.numel() for shape in self._shapes)  # W
        self.transfers = RankTransfers.of(
            plan, dist.get_rank(group), width=self._width, scatter_from=scatter_from
        )
        self.natives = natives
        self.returns = returns
        """Whether gradients come home: some rank trains some of its experts."""
        self.refetch = refetch
        """Whether foreign weights are freed after forward and lent again in backward."""
        self._group = group
        self._grad_dtype = grad_dtype
        self._memory = memory
        self._stream = stream
        self._progress = progress
        self._note_bytes = note_bytes
        like = natives[0][0]
        self._weights = like.new_empty(self.transfers.num_foreign * self._width)
        # Gradients add up in fp32 (fp64 for fp64 weights).
        self._sum_dtype = torch.promote_types(torch.float32, like.dtype)
        self._grads = like.new_empty(0, dtype=self._sum_dtype)
        self._held = 0
        self._transfer: PendingExchanges | None = None
        self._returned: torch.Tensor | None = None

    def __del__(self) -> None:
        self._hold(0)

    @property
    def tensors_per_expert(self) -> int:
        """Weights and biases of one expert."""
        return len(self._shapes)

    def start_fetch(self) -> None:
        """Start sending lent experts and receiving foreign ones."""
        with step("lend.start"):
            self._allocate(self._weights)
            self._hold(self._weights.nbytes)
            first, *second = self.transfers.exchanges
            whole = self._arrives_whole()
            buffers = [
                make_buffers(first, self._weights, incoming=self._weights if whole else None)
            ]
            buffers += [make_buffers(exchange, self._weights) for exchange in second]
            self._start(self._fetch(buffers), buffers)

    def continue_fetch(self) -> None:
        """Start the second exchange, if the plan has one."""
        with step("lend.next"):
            self._advance()

    def finish_fetch(self) -> None:
        """Wait for the foreign weights."""
        with step("lend.wait"):
            self._finish()

    def hand_out(self) -> list[Weights]:
        """F experts' weights, each with a `main_grad` for kernels that add to it by themselves.

        The `main_grad`s take no memory before `open_grads`.
        """
        self._grads = torch.empty_like(self._weights, dtype=self._sum_dtype)
        foreign = split_experts(self._weights, self._shapes)
        for weights, grads in zip(foreign, split_experts(self._grads, self._shapes), strict=True):
            for weight, grad in zip(weights, grads, strict=True):
                weight.main_grad = grad
        self._free(self._grads)
        return foreign

    def free_weights(self) -> None:
        """Give back the memory of the foreign weights; tensors over it stay, empty."""
        self._free(self._weights)
        self._hold(0)

    def drop_weights(self) -> None:
        """Let the foreign weights go after backward, though the graph may stay for a while."""
        if self.refetch:
            self.free_weights()
        else:
            # Not freed: a graph that is retained for a second backward still has them.
            self._weights = self._weights.new_empty(0)
            self._hold(0)

    def open_grads(self) -> None:
        """Allocate the foreign gradients, all zero."""
        self._allocate(self._grads)
        self._grads.zero_()

    def add_grads(self, grads: Iterable[torch.Tensor | None]) -> None:
        """Add gradients that autograd computed, in the order of the weights handed out."""
        slots = (slot for expert in split_experts(self._grads, self._shapes) for slot in expert)
        for slot, grad in zip(slots, grads, strict=True):
            if grad is not None:
                slot.add_(grad)

    def start_return(self) -> None:
        """Start sending the foreign gradients home and receiving those of lent experts."""
        with step("return.start"):
            like = self._grads.new_empty(0, dtype=self._grad_dtype)
            first, *second = (exchange.reverse() for exchange in self.transfers.exchanges)
            buffers = [make_buffers(exchange, like) for exchange in second]
            as_they_are = self._arrives_whole() and self._grads.dtype == like.dtype
            buffers.append(make_buffers(first, like, outgoing=self._grads if as_they_are else None))
            self._returned = buffers[-1][1]
            sums = self._grads.new_empty(count_numbers(self._find_own_shards()))
            self._start(self._return(buffers, sums), [*buffers, (sums,)])

    def continue_return(self) -> None:
        """Start the second exchange, if the plan has one."""
        with step("return.next"):
            self._advance()

    def finish_return(self) -> Iterator[tuple[int, int, slice, torch.Tensor]]:
        """Wait for the return: what to add to the gradients of lent experts, in a fixed order.

        Yields:
            native expert, number of its weight, numbers of that weight, and their gradients; by
            borrower, then expert.
        """
        with step("return.wait"):
            self._finish()
        self._free(self._grads)
        returned, self._returned = self._returned, None
        assert returned is not None
        pieces = self.transfers.exchanges[0].sends
        for piece, values in zip(pieces, split_pieces(returned, pieces), strict=True):
            parts = list(find_parts(piece, self._shapes))
            sizes = [where.stop - where.start for _, where in parts]
            for (i, where), grad in zip(parts, values.split(sizes), strict=True):
                yield piece.expert, i, where, grad

    def _fetch(self, buffers: list[tuple[torch.Tensor, torch.Tensor]]) -> Iterator[dist.Work]:
        """Pack native experts, exchange, put what came into the slots; then shards, if any."""
        first, *second = self.transfers.exchanges
        outgoing, incoming = buffers[0]
        parts = [
            self.natives[piece.expert][i].detach().reshape(-1)[where]
            for piece in first.sends
            for i, where in find_parts(piece, self._shapes)
        ]
        if parts:
            torch.cat(parts, out=outgoing)
        yield self._exchange(first, *buffers[0])
        if incoming is not self._weights:
            unpack(incoming, first.receives, self._weights, self._width)
        for exchange, (outgoing, incoming) in zip(second, buffers[1:], strict=True):
            pack(self._weights, exchange.sends, outgoing, self._width)
            yield self._exchange(exchange, outgoing, incoming)
            unpack(incoming, exchange.receives, self._weights, self._width)

    def _return(
        self, buffers: list[tuple[torch.Tensor, torch.Tensor]], sums: torch.Tensor
    ) -> Iterator[dist.Work]:
        """The way back of `_fetch`: shards of gradients to those who sum them, then home."""
        first, *second = (exchange.reverse() for exchange in self.transfers.exchanges)
        for exchange, (outgoing, incoming) in zip(second, buffers[:-1], strict=True):
            pack(self._grads, exchange.sends, outgoing, self._width)
            yield self._exchange(exchange, outgoing, incoming)
            sum_shards(
                self._grads,
                self._find_own_shards(),
                incoming,
                exchange.receives,
                sums,
                rank=dist.get_rank(self._group),
                width=self._width,
            )
        outgoing, incoming = buffers[-1]
        if outgoing is not self._grads:
            pack(self._grads, first.sends, outgoing, self._width)
        yield self._exchange(first, outgoing, incoming)

    def _start(
        self, steps: Iterator[dist.Work], buffers: Sequence[tuple[torch.Tensor, ...]]
    ) -> None:
        assert self._transfer is None
        flat = [tensor for pair in buffers for tensor in pair]
        self._transfer = PendingExchanges(steps, flat, stream=self._stream, progress=self._progress)

    def _advance(self) -> None:
        assert self._transfer is not None
        if len(self.transfers.exchanges) > 1:
            self._transfer.advance()

    def _finish(self) -> None:
        assert self._transfer is not None
        self._transfer.finish()
        self._transfer = None

    def _exchange(
        self, exchange: Exchange, outgoing: torch.Tensor, incoming: torch.Tensor
    ) -> dist.Work:
        """Start one all-to-all."""
        num_ranks = dist.get_world_size(self._group)
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
        return not any(exchange.receives for exchange in self.transfers.exchanges[1:])

    def _find_own_shards(self) -> list[Piece]:
        """The shard of each foreign expert that comes in shards which its home sends here."""
        in_shards = {piece.expert for each in self.transfers.exchanges[1:] for piece in each.sends}
        return [
            piece for piece in self.transfers.exchanges[0].receives if piece.expert in in_shards
        ]

    def _hold(self, num_bytes: int) -> None:
        self._memory.release(self._held)
        self._memory.hold(num_bytes)
        self._held = num_bytes

    @staticmethod
    def _allocate(flat: torch.Tensor) -> None:
        flat.untyped_storage().resize_(flat.nbytes)

    @staticmethod
    def _free(flat: torch.Tensor) -> None:
        flat.untyped_storage().resize_(0)
