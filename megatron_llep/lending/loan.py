"""A loan: the buffers and exchanges of one layer's lending for one micro-batch.

Letters: P ranks of the expert-parallel group, M native experts a rank, F foreign experts of this
rank in one plan, L experts this rank lends, W numbers in one expert's weights.
"""

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist

from megatron_llep.lending.memory import ForeignMemory
from megatron_llep.lending.route import Route
from megatron_llep.planner import Plan
from megatron_llep.progress import Progress

Weights = tuple[torch.Tensor, ...]


class Loan:
    """Foreign weights and their gradients, and the exchange in flight, if any.

    It must never hold the tensors that `hand_out` returned: as outputs of an autograd node whose
    context holds the loan, they would be a cycle that Python cannot collect.
    """

    def __init__(
        self,
        plan: Plan,
        natives: Sequence[Weights],
        *,
        group: dist.ProcessGroup,
        grad_dtype: torch.dtype,
        returns: bool,
        refetch: bool,
        memory: ForeignMemory,
        progress: Progress,
    ):
        """Prepare the buffers; `start_fetch` sends lent experts off, `lend` waits for them.

        Args:
            plan: this micro-batch's plan, the same on every rank.
            natives: M tuples of this rank's expert weights, alike in shapes and dtype on all ranks.
            group: the P ranks; used for nothing else, so that lending overlaps token exchange.
            grad_dtype: dtype in which the gradients return.
            returns: whether any rank needs gradients back; the same on every rank.
            refetch: whether to free foreign weights after forward and lend them again in backward;
                the same on every rank.
            memory: counts the foreign weights of this rank.
            progress: tells in errors where this rank was.
        """
        self.route = route = Route.of(plan, dist.get_rank(group))
        self.natives = natives
        self.returns = returns
        """Whether gradients come home: some rank trains some of its experts."""
        self.refetch = refetch
        """Whether foreign weights are freed after forward and lent again in backward."""
        self._group = group
        self._grad_dtype = grad_dtype
        self._memory = memory
        self._progress = progress
        self._shapes = tuple(weight.shape for weight in natives[0])
        self._width = sum(shape.numel() for shape in self._shapes)  # W
        like = natives[0][0]
        # [F * W] each. Gradients add up in fp32 (fp64 for fp64 weights).
        self._weights = like.new_empty(sum(route.receives) * self._width)
        self._grads = torch.empty_like(
            self._weights, dtype=torch.promote_types(torch.float32, like.dtype)
        )
        self._held = 0
        self._work: dist.Work | None = None
        self._in_flight: tuple[torch.Tensor, torch.Tensor] | None = None

    def __del__(self) -> None:
        self._hold(0)

    @property
    def tensors_per_expert(self) -> int:
        """Weights and biases of one expert."""
        return len(self._shapes)

    def start_fetch(self) -> None:
        """Start sending lent experts and receiving foreign ones."""
        with torch.no_grad():
            outgoing = _flatten((self.natives[i] for i in self.route.lent), self._weights)
        self._allocate(self._weights)
        self._hold(self._weights.nbytes)
        self._start_exchange(self._weights, outgoing, self.route.sends, self.route.receives)

    def finish(self) -> torch.Tensor:
        """Wait for the exchange in flight; what came in."""
        assert self._work is not None
        assert self._in_flight is not None
        with self._progress.told_in_errors():
            self._work.wait()
        incoming, _ = self._in_flight
        self._work = self._in_flight = None
        return incoming

    def hand_out(self) -> list[Weights]:
        """F experts' weights, each with a `main_grad` for kernels that add to it by themselves.

        The `main_grad`s take no memory before `open_grads`.
        """
        foreign = self._split(self._weights)
        for weights, grads in zip(foreign, self._split(self._grads), strict=True):
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
        slots = (slot for expert in self._split(self._grads) for slot in expert)
        for slot, grad in zip(slots, grads, strict=True):
            if grad is not None:
                slot.add_(grad)

    def start_return(self) -> None:
        """Start sending the foreign gradients home and receiving those of lent experts."""
        outgoing = self._grads.to(self._grad_dtype)
        incoming = outgoing.new_empty(len(self.route.lent) * self._width)
        self._start_exchange(incoming, outgoing, self.route.receives, self.route.sends)

    def finish_return(self) -> list[tuple[int, Weights]]:
        """Wait for the return: (native expert, gradients) by borrower, then expert."""
        returned = self._split(self.finish())
        self._free(self._grads)
        return list(zip(self.route.lent, returned, strict=True))

    def _start_exchange(
        self,
        incoming: torch.Tensor,
        outgoing: torch.Tensor,
        sends: tuple[int, ...],
        receives: tuple[int, ...],
    ) -> None:
        """Start an all-to-all of sends[r] experts to and receives[r] experts from each rank r."""
        self._in_flight = (incoming, outgoing)  # keeps both alive
        with self._progress.told_in_errors():
            self._work = dist.all_to_all_single(
                incoming,
                outgoing,
                output_split_sizes=[count * self._width for count in receives],
                input_split_sizes=[count * self._width for count in sends],
                group=self._group,
                async_op=True,
            )

    def _split(self, flat: torch.Tensor) -> list[Weights]:
        """Cut [n * W] numbers into n experts' tensors, without copying.

        They are tensors over one storage rather than views, so that an autograd node may return
        them as outputs of their own, and freeing the storage frees them all.
        """
        experts = []
        for start in range(0, flat.numel(), self._width):
            tensors, offset = [], start
            for shape in self._shapes:
                tensors.append(flat.new_empty(0).set_(flat.untyped_storage(), offset, shape))
                offset += shape.numel()
            experts.append(tuple(tensors))
        return experts

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


def _flatten(experts: Iterable[Weights], like: torch.Tensor) -> torch.Tensor:
    """Copy the experts' weights one after another into a flat buffer."""
    pieces = [weight.reshape(-1) for expert in experts for weight in expert]
    return torch.cat(pieces) if pieces else like.new_empty(0)
