"""One draw on one rank: LLEP, late at random, against unmodified Megatron; what comes out of it."""

import contextlib
import random
import time
import zlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from chaos_draws.draw import Draw
from chaos_draws.layers import MoEStack, Ran, run
from megatron_llep.integration.convert import convert_model
from megatron_llep.lending.groups import LENDING
from megatron_llep.placement.forward import Planned
from support.chaos import make_delays, watch_collectives
from support.comparison import get_relative_difference
from support.llep import note_decisions

# Relative to a tensor's largest value: of outputs, and of gradients. As in the tests of parity.
TOLERANCES = {
    "float32": (1e-5, 1e-4),
    "float64": (1e-10, 1e-10),
    "bfloat16": (2e-2, 2e-2),
}

Disturb = Callable[[Draw, int], AbstractContextManager[object]]
"""Entered around the run with LLEP of a draw on a rank: how tests plant a fault."""


@dataclass(frozen=True, kw_only=True)
class RankReport:
    """What one rank found; plain values, so that it can be told as JSON."""

    differs: list[str]
    """Tensors in which LLEP differs from plain Megatron by more than rounding."""
    plans: list[int]
    """Digests of all plans, in order."""
    lent: int
    """Experts lent in them; those of a forward that is recomputed count again."""
    sharers: list[int]
    """The ranks that make the same plans."""
    calls: int
    """A hash of all collectives, in order."""
    exchanges: int
    """In the lending group, by which experts and gradients travel."""
    reduced: list[tuple[list[int], int]]
    """Ranks that reduced gradients together, and a hash of these; dense ones, then experts'."""


def compare(draw: Draw, rank: int, disturb: Disturb | None = None) -> dict[str, Any]:
    """Run a draw in its layout, which is in use; a `RankReport` as a dictionary."""
    plain = run(draw, lambda _: None)
    exact = run(draw, lambda _: None, exact=True) if draw.dtype == "bfloat16" else None
    decisions: list[Planned] = []
    sharers: list[int] = []

    def convert(stack: MoEStack) -> None:
        convert_model([stack], draw.llep)
        note_decisions([stack], decisions)
        sharers.extend(dist.get_process_group_ranks(stack.layers[0].token_dispatcher.tp_ep_group))
        for layer in stack.layers:
            layer.register_forward_pre_hook(_make_late(draw, rank))
        # The first draw of a layout makes groups, later ones find them.
        calls.clear()

    delays = make_delays(draw.number, rank, share=draw.delay_share, longest=draw.delay_seconds)
    disturbed = disturb(draw, rank) if disturb is not None else contextlib.nullcontext()
    with watch_collectives(delays) as calls, disturbed:
        ours = run(draw, convert)
    return asdict(
        RankReport(
            differs=find_differences(draw, ours, plain, exact),
            plans=[decision.plan.digest for decision in decisions],
            lent=sum(len(decision.plan.transfers) for decision in decisions),
            sharers=sorted(sharers),
            calls=zlib.crc32(repr(calls).encode()),
            exchanges=sum(purpose == LENDING for _, purpose, _ in calls),
            reduced=_hash_reduced(ours),
        )
    )


def find_differences(draw: Draw, ours: Ran, plain: Ran, exact: Ran | None) -> list[str]:
    """What differs by more than is allowed.

    Args:
        draw: of both.
        ours: with LLEP.
        plain: without.
        exact: plain in more precision: gradients may differ from plain's as much as those do.
    """
    differs = []
    of_outputs, of_gradients = TOLERANCES[draw.dtype]
    for kind, tolerance in (("outputs", of_outputs), ("gradients", of_gradients)):
        found, expected = getattr(ours, kind), getattr(plain, kind)
        if found.keys() != expected.keys():
            differs.append(f"{kind}: {sorted(found)} instead of {sorted(expected)}")
            continue
        for name, value in expected.items():
            allowed = tolerance
            if exact is not None:
                allowed = max(allowed, _get_difference(value, getattr(exact, kind)[name]))
            difference = _get_difference(found[name], value)
            if not difference <= allowed:  # NaN too
                differs.append(f"{name}: by {difference:.1e}, allowed {allowed:.1e}")
    return differs


def find_disagreements(reports: Sequence[RankReport]) -> list[str]:
    """What ranks have unlike that must be alike, by rank."""
    found = []
    for rank, report in enumerate(reports):
        first = report.sharers[0]
        for what in ("plans", "calls"):
            if getattr(report, what) != getattr(reports[first], what):
                found.append(f"ranks {first} and {rank} have unlike {what}")
        if report.lent and not report.exchanges:
            found.append(f"rank {rank} sent nothing, though experts are lent")
        for index, (ranks, digest) in enumerate(report.reduced):
            if digest != reports[ranks[0]].reduced[index][1]:
                what = "of experts" if index else "of dense weights"
                found.append(f"ranks {ranks[0]} and {rank} have unlike reduced gradients {what}")
    return found


def count_lent(reports: Sequence[RankReport]) -> int:
    """Experts lent by all ranks."""
    return sum(report.lent for rank, report in enumerate(reports) if report.sharers[0] == rank)


def _get_difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    if found.shape != expected.shape:
        return float("inf")
    if not expected.numel():
        return 0.0
    return get_relative_difference(found.double(), expected.double())


def _make_late(draw: Draw, rank: int) -> Callable[..., None]:
    """A hook that lets the draw's late rank sleep."""
    random_ = random.Random(f"late {draw.seed} {draw.number}")

    def sleep(*_: object) -> None:
        if rank == draw.late_rank:
            time.sleep(random_.uniform(0, 2 * draw.delay_seconds))

    return sleep


def _hash_reduced(ran: Ran) -> list[tuple[list[int], int]]:
    dense = parallel_state.get_data_parallel_group(with_context_parallel=True)
    experts = parallel_state.get_expert_data_parallel_group()
    hashed = []
    for group, is_expert in ((dense, False), (experts, True)):
        digest = 0
        for name, gradient in ran.gradients.items():
            if (name in ran.expert_names) == is_expert:
                digest = zlib.crc32(gradient.contiguous().view(torch.uint8).numpy(), digest)
        hashed.append((dist.get_process_group_ranks(group), digest))
    return hashed
