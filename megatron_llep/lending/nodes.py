"""What lending does in backward, in a fixed order, the same on every rank.

Letters: F foreign experts of this rank.

    HoldGrads  on the layer's input; native weights are inputs too, so the engine keeps their
               gradient hooks (and with them the data-parallel reduction) until HoldGrads has run
    relay      on the tokens about to be dispatched
    (natives)
    Lend       on the rows that foreign experts compute; hands out the foreign weights
    (foreign experts)
    settle     on what foreign experts computed
    refetch    on the combined output

    backward:  refetch starts to fetch freed weights again -> combine -> settle waits for them
               -> foreign experts -> Lend starts the return -> natives -> dispatch
               -> relay starts its second exchange -> HoldGrads waits for it and adds it

`HoldGrads` and `Lend` are autograd nodes, as weights are among their inputs or outputs. The others
pass nothing on and are hooks of a tensor: they run when its gradient is there.

Every rank runs all of them, whether or not it lends or borrows. (relay only if the plan lends an
expert in shards, refetch only if weights are freed.)

Under `--overlap-moe-expert-parallel-comm` Megatron cuts a layer's graph between its steps and runs
the backward of each piece by itself, beside a forward of another micro-batch. The native weights'
hooks fire at the end of the piece that they are used in. So `HoldGrads` is in that piece too:

    HoldGrads  on the tokens that arrived; there is no relay, it starts the second exchange itself

Under `--delay-wgrad-compute` the natives' gradients and hooks come later still, in `backward_dw`:

    PutOff     in place of HoldGrads; waits for nothing, `add_returned` does so in `backward_dw`
"""

from collections import deque
from collections.abc import Callable, Sequence

import torch

from megatron_llep.lending.loan import WeightLoan
from megatron_llep.lending.parcel import Weights


def hold_grads(
    loan: WeightLoan | None, natives: Sequence[Weights], hidden: torch.Tensor, *, hold_all: bool
) -> torch.Tensor:
    """Pass the layer's input; in backward, wait for the returned gradients and add them.

    The data-parallel reduction starts a bucket when the hooks of all its weights have fired. Ranks
    that reduce together must start buckets in the same order, though some may lend in this layer
    and others not. So there all hooks wait for this node, which is the same one with and without
    a loan. Where nothing is reduced those of lent experts suffice, and fewer gradients pile up.

    Args:
        loan: of this layer and micro-batch; None where nothing is lent.
        natives: M experts' weights.
        hidden: the layer's input.
        hold_all: whether other ranks reduce these experts' gradients together with this one.
    """
    if not ((loan is None or loan.returns) and torch.is_grad_enabled()):
        return hidden
    held: Sequence[int] = range(len(natives))
    if not hold_all:
        held = loan.lent if loan is not None else ()
    weights = [weight for expert in held for weight in natives[expert]]
    return _HoldGrads.apply(loan, held, hidden, *weights, *_make_anchors(hidden))


def put_off(loan: WeightLoan, hidden: torch.Tensor, later: deque[WeightLoan]) -> torch.Tensor:
    """Pass the tokens that arrived; in backward, leave the return to `add_returned`.

    Args:
        loan: of this layer and micro-batch.
        hidden: what all experts' rows are taken from.
        later: gets the loan when the natives' part of backward is done.
    """
    if not (loan.returns and torch.is_grad_enabled()):
        return hidden
    return _PutOff.apply(loan, later, hidden, *_make_anchors(hidden))


@torch.no_grad()
def add_returned(loan: WeightLoan) -> None:
    """Wait for the returned gradients; add them to `main_grad`, or `grad` where there is none."""

    def find_grad(native: int, i: int, _: torch.Tensor) -> torch.Tensor:
        weight = loan.natives[native][i]
        if weight.grad is None:
            weight.grad = torch.zeros(weight.shape, dtype=weight.dtype, device=weight.device)
        return weight.grad

    _add_returned(loan, find_grad)


def relay(loan: WeightLoan, rows: torch.Tensor) -> None:
    """In backward of tokens that are about to be dispatched, start a second exchange.

    It starts after dispatch's own, so that it does not keep that from starting.
    """
    if loan.returns and torch.is_grad_enabled() and loan.has_shards:
        rows.register_hook(lambda _: loan.continue_return())


def lend(loan: WeightLoan, hidden: torch.Tensor) -> tuple[torch.Tensor, list[Weights]]:
    """Pass the rows of foreign experts and hand out the F experts' weights.

    In backward the return starts when the gradient of these rows is there: there must be such a
    tensor on every rank, though it may have no rows. Where nothing returns, the weights are let go
    of then.
    """
    loan.finish_fetch()
    if not torch.is_grad_enabled():
        return hidden, loan.hand_out()
    hidden, *flat = _Lend.apply(loan, hidden)
    width = loan.tensors_per_expert
    return hidden, [tuple(flat[i : i + width]) for i in range(0, len(flat), width)]


def settle(loan: WeightLoan, outputs: Sequence[torch.Tensor]) -> None:
    """The foreign weights are not needed again before the backward of what they computed.

    Args:
        loan: of this layer and micro-batch.
        outputs: of natives, then of foreign experts. The last may need no gradient where there are
            none; what was fetched again is waited for all the same.
    """
    go_back = [each for each in outputs if torch.is_grad_enabled() and each.requires_grad]
    if loan.refetch or not go_back:
        loan.free_weights()

    def prepare(_: torch.Tensor) -> None:
        if loan.refetch:
            loan.finish_fetch()
        if loan.returns:
            loan.open_grads()

    if go_back:
        go_back[-1].register_hook(prepare)


def refetch(loan: WeightLoan, output: torch.Tensor) -> None:
    """In backward of the combined output, start to fetch weights that were freed."""
    if loan.refetch and torch.is_grad_enabled() and output.requires_grad:
        output.register_hook(lambda _: loan.start_fetch())


def _make_anchors(hidden: torch.Tensor) -> list[torch.Tensor]:
    """What keeps a node in the graph of a rank on which nothing else needs a gradient."""
    if hidden.requires_grad:
        return []
    return [torch.empty(0, device=hidden.device, requires_grad=True)]


class _HoldGrads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, loan: WeightLoan | None, held: Sequence[int], hidden: torch.Tensor, *others
    ) -> torch.Tensor:
        ctx.loan, ctx.held, ctx.num_others = loan, held, len(others)
        return hidden

    @staticmethod
    def backward(ctx, grad_hidden):
        loan: WeightLoan | None = ctx.loan
        if loan is None:
            return (None, None, grad_hidden, *[None] * ctx.num_others)
        grads: dict[int, list[torch.Tensor | None]] = {
            expert: [None] * loan.tensors_per_expert for expert in ctx.held
        }

        def make_grad(native: int, i: int, like: torch.Tensor) -> torch.Tensor:
            grad = grads[native][i]
            if grad is None:
                grad = grads[native][i] = like.new_zeros(loan.natives[native][i].shape)
            return grad

        _add_returned(loan, make_grad)
        flat = [grad for expert in ctx.held for grad in grads[expert]]
        return (None, None, grad_hidden, *flat, *[None] * (ctx.num_others - len(flat)))


class _PutOff(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, loan: WeightLoan, later: deque[WeightLoan], hidden: torch.Tensor, *anchors
    ) -> torch.Tensor:
        ctx.loan, ctx.later, ctx.num_anchors = loan, later, len(anchors)
        return hidden

    @staticmethod
    def backward(ctx, grad_hidden):
        ctx.loan.continue_return()
        ctx.later.append(ctx.loan)
        return None, None, grad_hidden, *[None] * ctx.num_anchors


class _Lend(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loan: WeightLoan, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.loan = loan
        ctx.set_materialize_grads(False)
        experts = loan.hand_out()
        frozen = set(range(loan.tensors_per_expert)) - set(loan.trained)
        ctx.mark_non_differentiable(*(expert[i] for expert in experts for i in frozen))
        return (hidden, *(weight for expert in experts for weight in expert))

    @staticmethod
    def backward(ctx, grad_hidden, *grad_foreign):
        loan: WeightLoan = ctx.loan
        if loan.returns:
            loan.add_grads(grad_foreign)
        loan.drop_weights()
        if loan.returns:
            loan.start_return()
        return None, grad_hidden


def _add_returned(
    loan: WeightLoan, find_grad: Callable[[int, int, torch.Tensor], torch.Tensor]
) -> None:
    """Wait for the return and add it, in a fixed order.

    Args:
        loan: whose gradients are on their way.
        find_grad: what they are added to for a weight without `main_grad`: given native expert,
            number of its weight, and a gradient to be like.
    """
    for native, i, numbers, grad in loan.finish_return():
        weight = loan.natives[native][i]
        if not weight.requires_grad:
            continue
        total = getattr(weight, "main_grad", None)
        if total is None:
            total = find_grad(native, i, grad)
        total.view(-1)[numbers].add_(grad)
