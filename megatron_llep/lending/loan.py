"""A loan: the buffers and exchanges of one layer's lending for one micro-batch.

Letters: P ranks of the expert-parallel group, M native experts a rank, F foreign experts of this
rank in one plan, W numbers in those of one expert's weights that train, B units in its parcel.

A fetch starts when this rank's tokens are on their way, so that they do not wait for the host to
prepare it. With all-to-all it does not wait for them, as the main stream does so only afterwards
(`travel.exchange_rows`); with a back end of the flex dispatcher it does. Both exchanges are then
launched in this order on all ranks.

On a GPU packing, exchanges and unpacking run on a side stream. Why this is safe:

- Every buffer is allocated on the main stream (that on which the loan was made) before the side
  stream starts to use it, and `SideStream.begin` lets the side stream wait for all that the main
  stream has by then: for the tokens' packing, but not for their exchange, which has a stream of its
  own and holds its buffers until the main stream waits. So whatever had the memory before is done
  with it, and weights that the last optimizer step or parameter gather wrote are in place when they
  are packed.
- Every transfer is finished: `lend`, `settle` and `HoldGrads` make the main stream wait for it,
  before they use what came, and before any buffer is let go of. So memory goes back to the main
  stream, whose allocations follow the side stream by then: no `record_stream` is needed, which
  would hold memory back until the device gets there. This is true of storages that are freed and
  allocated again (`resize_`) as well: it is done on the main stream.
- So the main stream is also behind the packing before anything can write the weights again: the
  next optimizer step comes after all of these.
- NCCL runs on a stream of its own, which waits for the current one at the call, and for which the
  current one waits at `Work.wait`: both are the side stream. Buffers are held until `join`, by the
  PendingExchanges, whatever the process group holds.
- Foreign weights are read, and gradients added up, by the main stream only, `main_grad` too; the
  side stream reads these, and puts sums of shards in their place, once their return has begun.
- The slab in which they add up goes from layer to layer, each of which zeroes it on the main
  stream. A loan closes it in `finish_return`, where the main stream waits for the side stream: for
  the packing, the sums, and an exchange that sent the slab itself. So it is zeroed after these.
- autograd runs a node's backward on the stream of its forward: the main stream here as well. Only
  what `refetch` starts may be called on another one, where a schedule combines tokens on a stream
  of its own; `start_fetch` goes back to the main stream, that of the forward. It depends on nothing
  that the other one does.
"""

import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property

import torch
import torch.distributed as dist

from megatron_llep.lending.exchanges import LoanExchanges
from megatron_llep.lending.foreign_grads import ForeignGrads
from megatron_llep.lending.packing import find_parts, split_pieces
from megatron_llep.lending.parcel import Parcel, Weights, drop_derived
from megatron_llep.lending.pending import PendingExchanges
from megatron_llep.lending.ranges import step
from megatron_llep.lending.shared import SharedLending
from megatron_llep.lending.trained import find_common_dtype, list_trained
from megatron_llep.lending.transfers import RankTransfers, find_lent
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
        node_size: int,
        grad_dtype: torch.dtype,
        trains: int,
        refetch: bool,
        shared: SharedLending,
        note_bytes: Callable[[int, int], None],
    ):
        """Note the plan's part; `start_fetch` sends lent experts off, `lend` waits for them.

        It takes no memory and little time, as tokens wait for it.

        Args:
            plan: this micro-batch's plan, the same on every rank.
            natives: M tuples of this rank's expert weights, alike in shape and dtype on all ranks.
            group: the P ranks; used for nothing else, so that lending overlaps token exchange.
            scatter_from: borrowers, or nodes, from which on an expert goes in shards; 0: none does.
            node_size: ranks on a node; divides P.
            grad_dtype: dtype in which the gradients return.
            trains: which of an expert's weights any rank trains (see `lending.trained`); the same
                on every rank. Where autograd records nothing no gradient returns all the same.
            refetch: whether to free foreign weights after forward and lend them again in backward;
                the same on every rank.
            shared: the model's stream, count of memory, and memory for gradients.
            note_bytes: called at each exchange with the bytes this rank sends and receives.
        """
        self._plan, self._scatter_from, self._node_size = plan, scatter_from, node_size
        self.natives = natives
        self._trains = trains
        self.attend(refetch=refetch)
        self._grad_dtype = grad_dtype
        self._group = group
        self._shared = shared
        self._note_bytes = note_bytes
        self._device = natives[0][0].device
        self._on_main = shared.stream_on(self._device).way_back()
        self._handed_out: list[weakref.ref[torch.Tensor]] = []
        self._held = 0
        self._grads: ForeignGrads | None = None
        self._pending: PendingExchanges | None = None
        self._is_continued = False
        self._returned: torch.Tensor | None = None

    def __del__(self) -> None:
        self._hold(0)
        # In the middle of a return the side stream may still read the gradients: they are let go
        # of like the other buffers, and not used again.
        if self._grads is not None and self._pending is None:
            self._grads.close()

    def attend(self, *, refetch: bool) -> None:
        """Note on what terms the layer's own forward runs, where its fetch was started before.

        That may have been in a forward that is recorded otherwise.
        """
        trained = list_trained(self._trains, len(self.natives[0]))
        self.trained = trained if torch.is_grad_enabled() else []
        """Numbers of the weights whose gradients come home: this forward is recorded, and some rank
        trains them. A frozen weight beside them (of adapters) costs nothing in backward."""
        self.refetch = refetch
        """Whether foreign weights are freed after forward and lent again in backward."""

    @cached_property
    def lent(self) -> list[int]:
        """Native experts (0..M-1) that this rank lends, ascending."""
        return find_lent(self._plan, self._group.rank())

    @property
    def has_shards(self) -> bool:
        """Whether there is a second exchange, of shards; the same on every rank."""
        return self._exchanges.number > 1

    @property
    def returns(self) -> bool:
        """Whether any gradient comes home."""
        return bool(self.trained)

    @property
    def tensors_per_expert(self) -> int:
        """Weights and biases of one expert."""
        return len(self.natives[0])

    @property
    def _sizes(self) -> list[int]:
        return [self.natives[0][i].numel() for i in self.trained]

    @cached_property
    def _parcel(self) -> Parcel:
        return Parcel.of(self.natives[0])

    @cached_property
    def _fetched(self) -> RankTransfers:
        """This rank's, in units of parcels."""
        return self._cut_transfers(self._parcel.width)

    @cached_property
    def _home(self) -> RankTransfers:
        """The same in numbers of the weights that train: what gradients take back."""
        width = sum(self._sizes)
        return self._fetched if width == self._parcel.width else self._cut_transfers(width)

    @cached_property
    def _exchanges(self) -> LoanExchanges:
        return LoanExchanges(
            parcel=self._parcel,
            fetched=self._fetched,
            group=self._group,
            shared=self._shared,
            note_bytes=self._note_bytes,
        )

    @cached_property
    def _weights(self) -> torch.Tensor:
        """[F * B] units of foreign weights."""
        return torch.empty(
            self._fetched.num_foreign * self._parcel.width,
            dtype=self._parcel.dtype,
            device=self._device,
        )

    def start_fetch(self) -> None:
        """Start sending lent experts and receiving foreign ones; all that has to be made for it."""
        with step("lend.start"), self._on_main():
            self._weights.untyped_storage().resize_(self._weights.nbytes)
            self._hold(self._weights.nbytes)
            assert self._pending is None
            self._pending = self._exchanges.start_fetch(self.natives, self._weights)
            self._is_continued = False

    def continue_fetch(self) -> None:
        """Start the second exchange, if the plan has one and it has not started."""
        if not self._is_continued:
            self._is_continued = True
            with step("lend.next"):
                self._advance()

    def finish_fetch(self) -> None:
        """Wait for the foreign weights."""
        with step("lend.wait"):
            self._finish()

    def hand_out(self) -> list[Weights]:
        """F experts' weights; those whose gradients return have a `main_grad` (`ForeignGrads`)."""
        foreign = self._parcel.split(self._weights)
        if self._parcel.is_quantised:
            self._handed_out = [weakref.ref(weight) for expert in foreign for weight in expert]
        if self.returns:
            self._grads = ForeignGrads(
                [self.pick_trained(expert) for expert in foreign],
                dtype=find_common_dtype(self.pick_trained(self.natives[0])),
                device=self._device,
                scratch=self._shared.grad_scratch,
            )
        return foreign

    def pick_trained[T](self, of_expert: Sequence[T]) -> tuple[T, ...]:
        """Of one expert's weights, or of what stands for them, those whose gradients return."""
        return tuple(of_expert[i] for i in self.trained)

    def free_weights(self) -> None:
        """Give back the memory of the foreign weights; tensors over it stay, empty."""
        self._drop_derived()
        self._free(self._weights)
        self._hold(0)

    def drop(self) -> None:
        """Wait for a fetch that no forward came for, and let go of what it brought."""
        if self._pending is not None:
            self._finish()
        self.free_weights()

    def drop_weights(self) -> None:
        """Let the foreign weights go after backward, though the graph may stay for a while."""
        if self.refetch:
            self.free_weights()
        else:
            # Not freed: a graph that is retained for a second backward still has them.
            self._drop_derived()
            self._weights = self._weights.new_empty(0)
            self._hold(0)

    def open_grads(self) -> None:
        """Take memory for the foreign gradients, all zero."""
        assert self._grads is not None
        self._grads.open()

    def add_grads(self, grads: Sequence[torch.Tensor | None]) -> None:
        """Add gradients that autograd computed, in the order of the weights handed out."""
        assert self._grads is not None
        width = self.tensors_per_expert
        experts = (grads[i : i + width] for i in range(0, len(grads), width))
        self._grads.add(grad for expert in experts for grad in self.pick_trained(expert))

    def start_return(self) -> None:
        """Start sending the foreign gradients home and receiving those of lent experts."""
        with step("return.start"):
            assert self._pending is None
            assert self._grads is not None
            self._pending, self._returned = self._exchanges.start_return(
                self._grads.flat,
                self._grad_dtype,
                returned=self._home,
                width=sum(self._sizes),
            )

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
        returned, self._returned = self._returned, None
        assert self._grads is not None
        assert returned is not None
        self._grads.close()
        pieces = self._home.exchanges[0].sends
        sizes_of_weights = self._sizes
        for piece, values in zip(pieces, split_pieces(returned, pieces), strict=True):
            parts = list(find_parts(piece, sizes_of_weights))
            sizes = [where.stop - where.start for _, where in parts]
            for (i, where), grad in zip(parts, values.split(sizes), strict=True):
                yield piece.expert, self.trained[i], where, grad

    def _cut_transfers(self, width: int) -> RankTransfers:
        return RankTransfers.of(
            self._plan,
            self._group.rank(),
            width=width,
            scatter_from=self._scatter_from,
            node_size=self._node_size,
        )

    def _advance(self) -> None:
        assert self._pending is not None
        if self.has_shards:
            self._pending.advance()

    def _finish(self) -> None:
        assert self._pending is not None
        self._pending.finish()
        self._pending = None

    def _drop_derived(self) -> None:
        """Free what TE made of quantised weights; it would live as long as the graph."""
        for reference in self._handed_out:
            weight = reference()
            if weight is not None:
                drop_derived(weight)

    def _hold(self, num_bytes: int) -> None:
        self._shared.memory.release(self._held)
        self._shared.memory.hold(num_bytes)
        self._held = num_bytes

    @staticmethod
    def _free(flat: torch.Tensor) -> None:
        flat.untyped_storage().resize_(0)
