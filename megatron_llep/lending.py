"""Lending: expert weights to borrowers in forward, their gradients home in backward.

Letters: P ranks of the expert-parallel group, M native experts a rank, F foreign experts of this
rank in one plan, L experts this rank lends (an expert lent twice counts twice), W numbers in one
expert's weights, H hidden size.

Three autograd nodes, the same on every rank, give backward a fixed order whatever a rank lends:

    Gate      on the layer's input; the native weights are inputs too, so the engine keeps their
              gradient hooks (and with them the data-parallel reduction) until Gate has run
    Lend      on the dispatched tokens; hands out the foreign weights
    (experts)

    backward:  experts -> Lend starts the return -> dispatch -> Gate waits and adds it

Foreign weights are plain tensors in one flat buffer: outside parameters, optimizer, DDP and
checkpoints.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist

from megatron_llep.planner import Plan

Weights = tuple[torch.Tensor, ...]


@dataclass(frozen=True, kw_only=True)
class Route:
    """Which experts this rank sends to whom, and how many it gets from whom, under one plan.

    Backward is the mirror image: what was sent in forward is received, and the reverse.
    """

    lent: tuple[int, ...]
    """L native experts (0..M-1), in the order in which they are sent: by borrower, expert."""
    sends: tuple[int, ...]
    """Experts sent to each of the P ranks."""
    receives: tuple[int, ...]
    """Experts received from each of the P ranks; foreign slots are in the same order."""

    @classmethod
    def of(cls, plan: Plan, rank: int) -> "Route":
        """The transfers of the plan, in their order, that `rank` takes part in."""
        expert, home, borrower = plan.transfers.T
        is_lender, is_borrower = home == rank, borrower == rank
        return cls(
            lent=tuple((expert[is_lender] - rank * plan.experts_per_rank).tolist()),
            sends=tuple(np.bincount(borrower[is_lender], minlength=plan.num_ranks).tolist()),
            receives=tuple(np.bincount(home[is_borrower], minlength=plan.num_ranks).tolist()),
        )


@dataclass(kw_only=True)
class Loan:
    """One layer's lending for one micro-batch, from the plan until its gradients are home."""

    route: Route
    natives: Sequence[Weights]
    """M tuples of this rank's own expert weights."""
    group: dist.ProcessGroup
    grad_dtype: torch.dtype
    returns: bool
    """Whether gradients come home: some rank trains some of its experts."""
    work: dist.Work | None = None
    """The exchange in flight: of weights in forward, of gradients in backward."""
    outgoing: torch.Tensor | None = None
    """[L * W] while the exchange of weights, [F * W] while that of gradients, is in flight."""
    incoming: torch.Tensor | None = None
    """[F * W] foreign weights, later [L * W] returned gradients."""
    shapes: tuple[torch.Size, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.shapes = tuple(weight.shape for weight in self.natives[0])

    @property
    def expert_numel(self) -> int:
        """W."""
        return sum(shape.numel() for shape in self.shapes)

    def start_exchange(
        self, outgoing: torch.Tensor, sends: tuple[int, ...], receives: tuple[int, ...]
    ) -> None:
        """Start sending [sum(sends) * W] numbers and receiving [sum(receives) * W]."""
        width = self.expert_numel
        self.outgoing = outgoing
        self.incoming = outgoing.new_empty(sum(receives) * width)
        self.work = dist.all_to_all_single(
            self.incoming,
            outgoing,
            output_split_sizes=[count * width for count in receives],
            input_split_sizes=[count * width for count in sends],
            group=self.group,
            async_op=True,
        )

    def finish_exchange(self) -> torch.Tensor:
        """Wait for the exchange in flight and return what came in."""
        assert self.work is not None, "no exchange is in flight"
        self.work.wait()
        incoming = self.incoming
        assert incoming is not None
        self.work = self.outgoing = self.incoming = None
        return incoming

    def split(self, flat: torch.Tensor) -> list[Weights]:
        """Cut [n * W] numbers into n experts' tensors, without copying.

        They are tensors over one storage rather than views: an autograd node may then return them
        as outputs of their own.
        """
        experts = []
        for start in range(0, flat.numel(), self.expert_numel):
            tensors, offset = [], flat.storage_offset() + start
            for shape in self.shapes:
                tensors.append(flat.new_empty(0).set_(flat.untyped_storage(), offset, shape))
                offset += shape.numel()
            experts.append(tuple(tensors))
        return experts


def start_lending(
    plan: Plan,
    natives: Sequence[Weights],
    *,
    group: dist.ProcessGroup,
    grad_dtype: torch.dtype,
    returns: bool,
) -> Loan:
    """Start sending lent experts to their borrowers; `lend` waits for them.

    Args:
        plan: this micro-batch's plan, the same on every rank.
        natives: M tuples of this rank's expert weights, alike in shapes and dtype on all ranks.
        group: the P ranks; used for nothing else, so that lending overlaps token exchange.
        grad_dtype: dtype in which the gradients return.
        returns: whether any rank needs gradients back; the same on every rank.
    """
    loan = Loan(
        route=Route.of(plan, dist.get_rank(group)),
        natives=natives,
        group=group,
        grad_dtype=grad_dtype,
        returns=returns,
    )
    with torch.no_grad():
        outgoing = _flatten((natives[i] for i in loan.route.lent), like=natives[0][0])
    loan.start_exchange(outgoing, loan.route.sends, loan.route.receives)
    return loan


def gate(loan: Loan, hidden: torch.Tensor) -> torch.Tensor:
    """Pass the layer's input; in backward, wait for the returned gradients and add them."""
    if not (loan.returns and torch.is_grad_enabled()):
        return hidden
    weights = [weight for expert in loan.natives for weight in expert]
    # The anchor keeps the node in the graph of a rank on which nothing else needs a gradient.
    anchor = torch.empty(0, device=hidden.device, requires_grad=True)
    return _Gate.apply(loan, hidden, anchor, *weights)


def lend(loan: Loan, hidden: torch.Tensor) -> tuple[torch.Tensor, list[Weights]]:
    """Pass the dispatched tokens and hand out the F foreign experts' weights."""
    if not (loan.returns and torch.is_grad_enabled()):
        return hidden, loan.split(loan.finish_exchange())
    hidden, *flat = _Lend.apply(loan, hidden)
    width = len(loan.shapes)
    return hidden, [tuple(flat[i : i + width]) for i in range(0, len(flat), width)]


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loan: Loan, hidden: torch.Tensor, anchor, *weights) -> torch.Tensor:
        ctx.loan = loan
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx, grad_hidden):
        loan: Loan = ctx.loan
        returned = loan.split(loan.finish_exchange())
        grads: list[list[torch.Tensor | None]] = [[None] * len(loan.shapes) for _ in loan.natives]
        # Rows come by borrower, then expert: a fixed order of summation.
        for native, row in zip(loan.route.lent, returned, strict=True):
            for i, (weight, grad) in enumerate(zip(loan.natives[native], row, strict=True)):
                if not weight.requires_grad:
                    continue
                main_grad = getattr(weight, "main_grad", None)
                if main_grad is not None:
                    main_grad.add_(grad)
                    continue
                known = grads[native][i]
                grads[native][i] = grad if known is None else known.add_(grad)
        return (None, grad_hidden, None, *(grad for expert in grads for grad in expert))


class _Lend(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loan: Loan, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.loan = loan
        ctx.set_materialize_grads(False)
        foreign = loan.split(loan.finish_exchange())
        return (hidden.view_as(hidden), *(weight for expert in foreign for weight in expert))

    @staticmethod
    def backward(ctx, grad_hidden, *grad_foreign):
        loan: Loan = ctx.loan
        outgoing = torch.zeros(
            sum(loan.route.receives) * loan.expert_numel,
            dtype=loan.grad_dtype,
            device=loan.natives[0][0].device,
        )
        slots = (weight for expert in loan.split(outgoing) for weight in expert)
        for slot, grad in zip(slots, grad_foreign, strict=True):
            if grad is not None:
                slot.copy_(grad)
        loan.start_exchange(outgoing, loan.route.receives, loan.route.sends)
        return None, grad_hidden


def _flatten(experts, *, like: torch.Tensor) -> torch.Tensor:
    """Copy the experts' weights one after another into a flat buffer."""
    pieces = [weight.reshape(-1) for expert in experts for weight in expert]
    return torch.cat(pieces) if pieces else like.new_empty(0)
