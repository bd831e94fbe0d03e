"""Models whose routers replay given routes, plain and with LLEP, forward by forward.

Letters: T = tokens of this rank, K = experts of a token, E = experts, L = MoE layers.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

from megatron_llep.config import LLEPConfig
from megatron_llep.integration.convert import convert_model
from megatron_llep.placement.forward import Planned
from support.chaos import Call, watch_collectives
from support.comparison import get_relative_difference
from support.llep import note_decisions
from support.training import Chunks, Run, _forward_step, build_model, make_config, make_tokens

REPLAYING = {"moe_enable_routing_replay": True}
TOKENS, WEIGHTS, COUNTS = "tokens", "weights", "counts"
_GROUPS = {"EXPERT_MODEL_PARALLEL_GROUP": TOKENS, "LLEP_LENDING": WEIGHTS}


def draw_routes(seed: int, T: int, K: int, E: int, *, twice: bool = False) -> torch.Tensor:
    """Experts [T, K], most of them of the first half; with `twice` a third of the tokens have one
    expert in all places."""
    generator = torch.Generator().manual_seed(seed)
    odds = torch.where(torch.arange(E) < E // 2, 8.0, 1.0)
    routes = torch.multinomial(odds.expand(T, E), K, generator=generator)
    if twice:
        routes[::3] = routes[::3, :1]
    return routes


def set_routes(model: Any, seed: int, T: int, *, twice: bool = False) -> None:
    """Let all routers of the process replay routes of their own in the forward that comes.

    Args:
        model: whose tokens and experts they are for.
        seed: other routes for another one.
        T: tokens, of all ranks of a sequence-parallel group.
        twice: as for `draw_routes`.
    """
    config = model.config
    if config.sequence_parallel:
        T //= config.tensor_model_parallel_size
    RouterReplay.clear_global_indices()
    RouterReplay.set_replay_data(
        [
            draw_routes(
                100 * seed + i, T, config.moe_router_topk, config.num_moe_experts, twice=twice
            )
            for i in range(len(RouterReplay.global_router_replay_instances))
        ]
    )
    RouterReplay.set_global_router_replay_action(RouterReplayAction.REPLAY_FORWARD)


def let_count_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let plain Megatron's dispatcher take a token that names an expert twice, as verl does."""
    preprocess = MoEAlltoAllTokenDispatcher.preprocess

    def count(self: Any, routing_map: torch.Tensor) -> Any:
        result = preprocess(self, routing_map)
        self.num_out_tokens = int(routing_map.sum())
        return result

    monkeypatch.setattr(MoEAlltoAllTokenDispatcher, "preprocess", count)


def build(run: Run, llep: LLEPConfig | None) -> tuple[torch.nn.Module, list[Planned]]:
    """One chunk, and what its LLEP layers will decide."""
    decisions: list[Planned] = []
    chunks = build_model(make_config(run), run)
    if llep is not None:
        convert_model(chunks, llep)
        note_decisions(chunks, decisions)
    return chunks[0], decisions


def build_anew(run: Run, llep: LLEPConfig | None) -> tuple[torch.nn.Module, list[Planned]]:
    """As `build`, of the only model of the process whose routers replay."""
    RouterReplay.clear_global_router_replay_instances()
    return build(run, llep)


@dataclass
class Seen:
    """What one model did in some micro-batches."""

    results: list[list[torch.Tensor]] = field(default_factory=list)
    """Of each: loss, then gradients."""
    calls: list[list[str]] = field(default_factory=list)
    """Of each forward: what was exchanged, in order."""
    ahead: list[list[bool]] = field(default_factory=list)
    """Of each forward: of each plan whether it was made before its layer ran."""


def run_forward(model: torch.nn.Module, run: Run, rank: int, number: int) -> torch.Tensor:
    """The loss of a micro-batch."""
    tokens = make_tokens(run, number, rank)
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    positions = torch.arange(inputs.shape[1]).expand_as(inputs)
    return model(inputs, positions, None, labels=labels).mean()


def run_micro_batches(
    run: Run,
    rank: int,
    llep: LLEPConfig | None,
    number: int,
    *,
    twice: bool = False,
    prepare: Callable[[int], None] | None = None,
) -> Seen:
    """Forward and backward of some micro-batches, each with its own routes.

    Args:
        run: what to build; no gradients are reduced.
        rank: whose tokens and routes.
        llep: None for plain Megatron.
        number: of micro-batches.
        twice: as for `draw_routes`.
        prepare: called with the number of each micro-batch, when its routes are set.
    """
    model, decisions = build_anew(run, llep)
    seen = Seen()
    for micro_batch in range(number):
        T = run.micro_batch_size * run.sequence_length
        set_routes(model, 10 * micro_batch + rank, T, twice=twice)
        if prepare is not None:
            prepare(micro_batch)
        planned = len(decisions)
        with watch_collectives() as calls:
            loss = run_forward(model, run, rank, micro_batch)
        seen.calls.append(list(_name(calls)))
        seen.ahead.append([each.ahead is not None for each in decisions[planned:]])
        model.zero_grad()
        loss.backward()
        gradients = [
            torch.zeros_like(weight) if weight.grad is None else weight.grad.clone()
            for weight in model.parameters()
        ]
        seen.results.append([loss.detach(), *gradients])
    return seen


def assert_same(seen: Seen, plain: Seen) -> None:
    """Losses to 1e-5, all gradients to 1e-4."""
    for mine, expected in zip(seen.results, plain.results, strict=True):
        for place, (one, other) in enumerate(zip(mine, expected, strict=True)):
            assert get_relative_difference(one, other) <= (1e-4 if place else 1e-5), place


def replaying_step(
    iterator: Iterator[Any], model: Any, return_schedule_plan: bool = False
) -> tuple[Any, Any]:
    """A `Run.forward_step`: the routes of a micro-batch follow from its tokens."""
    tokens = next(iterator)
    set_routes(model, int(tokens.sum()), tokens[:, 1:].numel())
    if return_schedule_plan:
        return _forward_step(iter([tokens]), model, return_schedule_plan)
    return _forward_step(iter([tokens]), model)


def build_chunks_anew(config: Any, run: Run, transform_spec: Any) -> Chunks:
    """A `Run.build`: of the only model of the process whose routers replay."""
    RouterReplay.clear_global_router_replay_instances()
    return build_model(config, run, transform_spec)


def _name(calls: Sequence[Call]) -> Iterator[str]:
    for name, desc, _ in calls:
        if "alltoall" in name or "all_to_all" in name:
            yield _GROUPS[desc]
        elif "allgather" in name or "all_gather" in name:
            yield COUNTS
