"""Where this rank is, for errors, and what it planned last: the ranks compare both."""

import contextlib
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist

from megatron_llep.placement.counting import ASTRAY
from megatron_llep.planner import Plan

_TRAINING, _RECORDED, _AGAIN, _MTP = 1, 2, 4, 8
_LAYER_SHIFT, _COUNT_SHIFT, _MARK_BITS = 4, 20, 63
_MULTIPLIER = 6364136223846793005  # odd and large: another order of plans is another number


class Progress:
    """The MoE layer that this rank entered last, and the plan that it made last."""

    def __init__(self) -> None:
        self._place = "no MoE layer yet"
        self._forwards: dict[str, int] = {}
        self._entered = 0
        self.mark = 0
        """The forward that this rank entered last, as a number below 2 ** 63: which layer, what
        for, and how many there were before. Equal on ranks that share tokens."""
        self._planned_in = self._place
        self._last_plan: Plan | None = None
        self._planned_before = 0

    def enter(self, place: str) -> None:
        """Note what begins now."""
        self._place = place

    def enter_forward(
        self, number: int, *, is_mtp: bool, training: bool, recorded: bool, again: bool
    ) -> str:
        """Note that a layer's forward begins, and return it in words.

        Args:
            number: of the layer, from 1.
            is_mtp: whether it is of multi-token prediction.
            training: whether it is counted.
            recorded: whether autograd records it.
            again: whether it is recomputed, and not to be counted again.
        """
        layer = name_layer(number, is_mtp)
        self._entered += 1
        kind = _TRAINING * training + _RECORDED * recorded + _AGAIN * again + _MTP * is_mtp
        where = number << _LAYER_SHIFT | self._entered << _COUNT_SHIFT
        self.mark = (kind | where) % (1 << _MARK_BITS)
        if not training:
            place = f"{layer}, evaluation"
        else:
            self._forwards[layer] = self._forwards.get(layer, 0) + (not again)
            place = f"{layer}, micro-batch {self._forwards[layer]} since the start"
        self.enter(f"forward of {place}")
        return place

    def note_plan(self, plan: Plan, ahead_of: str | None = None) -> None:
        """Note what was planned: its digest goes out with the next counts.

        Args:
            plan: of the forward that this rank is in.
            ahead_of: a layer, if it was planned for one that comes later, from counts gathered
                before. Then the digest stands for the plans before this one as well.
        """
        self._planned_before = 0 if ahead_of is None else self.last_plan
        self._last_plan = plan
        self._planned_in = self._place if ahead_of is None else f"forward of {ahead_of}, or before"

    @property
    def last_plan(self) -> int:
        """Digest of the plans since the last count; 0 before the first."""
        if self._last_plan is None:
            return 0
        number = self._planned_before * _MULTIPLIER + self._last_plan.digest
        return (number + (1 << 63)) % (1 << 64) - (1 << 63)

    def compare_plans(self, group: dist.ProcessGroup) -> None:
        """Check at once that all ranks of the group made the same plan; on the host, over gloo.

        Raises:
            RuntimeError: as `check_plans`.
        """
        # The largest complement belongs to the smallest digest.
        extremes = torch.tensor([self.last_plan, ~self.last_plan])
        dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=group)
        most, least = extremes[0], ~extremes[1]
        if most != least:
            made = extremes.new_empty(dist.get_world_size(group))
            dist.all_gather_into_tensor(made, extremes.new_tensor([self.last_plan]), group=group)
            self.check_plans(made.tolist(), group)

    def check_plans(self, last_plans: list[int], group: dist.ProcessGroup) -> None:
        """Check that all ranks made the same plan.

        Args:
            last_plans: [R], the digests they sent.
            group: these sources.

        Raises:
            RuntimeError: on all ranks alike; names the plans, who made which, and where.
        """
        if min(last_plans) == max(last_plans):
            return
        made = "; ".join(
            f"ranks {makers}: plan {plan & (2**64 - 1):016x}"
            for plan, makers in _group_ranks(last_plans, group).items()
        )
        raise RuntimeError(
            f"megatron_llep: ranks that share tokens planned differently in the {self._planned_in} "
            f"({made}), so tokens or weights of that layer may be wrong. Plans are equal where "
            "counts, settings, the cost model and the versions of megatron_llep and numpy are: "
            "compare these between the ranks"
        )

    def check_foretold(self, known_ahead: Sequence[int], group: dist.ProcessGroup) -> None:
        """Check that no rank's layers were routed otherwise than it had foretold.

        Args:
            known_ahead: [R], as they sent it.
            group: these sources.

        Raises:
            RuntimeError: on all ranks alike; says on which, and the way out.
        """
        astray = _group_ranks(known_ahead, group).get(ASTRAY)
        if astray is None:
            return
        raise RuntimeError(
            f"megatron_llep: on ranks {astray} a router did not choose the experts that it was set "
            "to replay, from which its layer had been planned, so results of the forward before "
            "this one are wrong. Something changes what Megatron's routers choose: give "
            "--moe-llep-plan-ahead off"
        )

    def check_marks(self, marks: Sequence[int], group: dist.ProcessGroup) -> None:
        """Check that all ranks are in the same forward.

        Args:
            marks: [R], as they sent them.
            group: these sources.

        Raises:
            RuntimeError: on all ranks alike; says which rank is where, and the way out.
        """
        if min(marks) == max(marks):
            return
        where = "; ".join(
            f"ranks {ranks}: {_describe(mark)}"
            for mark, ranks in _group_ranks(marks, group).items()
        )
        raise RuntimeError(
            f"megatron_llep: ranks that share tokens are in different forwards ({where}), so "
            "nothing that they exchange fits. They must run as many forwards as each other, of the "
            "same models in the same order: give a rank that has no batch left one of padding, or "
            "leave its batches out on all"
        )

    @contextlib.contextmanager
    def told_in_errors(self) -> Iterator[None]:
        """Add to any error from within where this rank was."""
        try:
            yield
        except Exception as error:
            note = f"megatron_llep: this rank entered last: {self._place}"
            if note not in getattr(error, "__notes__", ()):
                error.add_note(note)
            raise


def is_in_backward() -> bool:
    """Whether autograd is at work: a forward within it is a recomputed one, whoever recomputes."""
    return torch._C._current_graph_task_id() != -1


def name_layer(number: int, is_mtp: bool) -> str:
    """A layer in words."""
    return f"{'MTP layer' if is_mtp else 'layer'} {number}"


def _describe(mark: int) -> str:
    """A forward in words, from its number."""
    layer = name_layer(mark % (1 << _COUNT_SHIFT) >> _LAYER_SHIFT, bool(mark & _MTP))
    kind = "training" if mark & _TRAINING else "evaluation"
    if mark & _AGAIN:
        kind += ", recomputed"
    elif not mark & _RECORDED:
        kind += ", without gradients"
    return f"{layer}, {kind}, forward {mark >> _COUNT_SHIFT} of the model's MoE layers"


def _group_ranks(sent: Sequence[int], group: dist.ProcessGroup) -> dict[int, list[int]]:
    """Which ranks of the job sent which number, in ascending order of these."""
    by_number: dict[int, list[int]] = {}
    ranks = dist.get_process_group_ranks(group)
    for rank, number in sorted(zip(ranks, sent, strict=True), key=lambda pair: pair[1]):
        by_number.setdefault(number, []).append(rank)
    return by_number
