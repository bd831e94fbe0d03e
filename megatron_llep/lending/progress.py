"""Where this rank is, for errors, and what it planned last, which the ranks compare."""

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist

from megatron_llep.planner import Plan


class Progress:
    """The MoE layer that this rank entered last, and the plan that it made last."""

    def __init__(self) -> None:
        self._place = "no MoE layer yet"
        self._forwards: dict[str, int] = {}
        self._planned_in = self._place
        self._last_plan: Plan | None = None

    def enter(self, place: str) -> None:
        """Note what begins now."""
        self._place = place

    def enter_forward(self, layer: str, *, training: bool, again: bool) -> str:
        """Note that a layer's forward begins, and return it in words.

        Args:
            layer: which one.
            training: whether it is counted.
            again: whether it is recomputed, and not to be counted again.
        """
        if not training:
            place = f"{layer}, evaluation"
        else:
            self._forwards[layer] = self._forwards.get(layer, 0) + (not again)
            place = f"{layer}, micro-batch {self._forwards[layer]} since the start"
        self.enter(f"forward of {place}")
        return place

    def note_plan(self, plan: Plan) -> None:
        """Note what was planned here: its digest goes out with the next counts."""
        self._last_plan, self._planned_in = plan, self._place

    @property
    def last_plan(self) -> int:
        """Digest of the last plan; 0 before the first."""
        return self._last_plan.digest if self._last_plan is not None else 0

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
        ranks = dist.get_process_group_ranks(group)
        made_by: dict[int, list[int]] = {}
        for rank, plan in sorted(zip(ranks, last_plans, strict=True), key=lambda pair: pair[1]):
            made_by.setdefault(plan, []).append(rank)
        made = "; ".join(
            f"ranks {makers}: plan {plan & (2**64 - 1):016x}" for plan, makers in made_by.items()
        )
        raise RuntimeError(
            f"megatron_llep: ranks that share tokens planned differently in the {self._planned_in} "
            f"({made}), so tokens or weights of that layer may be wrong. Plans are equal where "
            "counts, settings, the cost model and the versions of megatron_llep and numpy are: "
            "compare these between the ranks"
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
