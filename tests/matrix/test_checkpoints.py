"""`torch_dist` checkpoints from LLEP load in plain Megatron in another layout, and the reverse."""

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing

from megatron_llep.integration.convert import convert_model
from megatron_llep.placement.forward import Planned
from support.layout import Layout, use_layout
from support.llep import EAGER, note_decisions
from support.ranks import run_ranks
from support.training import Chunks, Run, build_model, make_config, train
from support.weights import Shard, list_parameters

MODEL = {"moe_shared_expert_intermediate_size": 32}
SIGMOID = {"moe_router_enable_expert_bias": True, "moe_router_score_function": "sigmoid"}
MOVES = [
    (Layout(ep=2, dp=4), Layout(ep=4)),
    (Layout(ep=4), Layout(ep=2, dp=4)),
    (Layout(ep=2, dp=4), Layout(tp=2, ep=2, etp=2)),
    (Layout(tp=2, ep=2, etp=2), Layout(pp=2, ep=2)),
]

PART = ("key", "dtype", "local_shape", "global_shape", "global_offset", "replica_id")
Parts = dict[str, tuple[torch.Tensor, Shard]]


def describe(chunks: Chunks) -> dict[str, Any]:
    """Key, global shape and this rank's part of everything that a checkpoint would hold."""
    described = {}
    for stage, chunk in enumerate(chunks):
        for name, entry in chunk.sharded_state_dict().items():
            part = {name: value for name, value in vars(entry).items() if name in PART}
            described[f"{stage}.{name}"] = (type(entry).__name__, part)
    return described


@pytest.mark.parametrize("layout", [Layout(ep=2), Layout(tp=2, ep=2, etp=1)], ids=str)
def test_a_checkpoint_has_the_same_contents(layout):
    def work(rank, size):
        run = Run(layout=layout, steps=1, config=MODEL | SIGMOID)
        plain = train(run, observe=describe).observed
        with use_layout(layout):
            chunks = build_model(make_config(run), run)
            before = describe(chunks)
            convert_model(chunks, EAGER)
            converted = describe(chunks)
            state = chunks[0].state_dict()
        assert len(plain) > 20
        assert plain == before == converted
        assert not any("llep" in name or "lend" in name for name in state)

    run_ranks(work, layout.world_size)


@pytest.mark.parametrize("saved_with_llep", [True, False], ids=["from LLEP", "to LLEP"])
def test_checkpoints_move_between_layouts(saved_with_llep):
    def work(rank, size, folder):
        for number, (layout, other) in enumerate(MOVES):
            move(Path(folder) / str(number), layout, other, saved_with_llep)

    with tempfile.TemporaryDirectory() as folder:
        run_ranks(work, 4, folder, timeout=240)


def move(folder: Path, layout: Layout, other: Layout, saved_with_llep: bool) -> None:
    """Train and save in one layout, load in the other, and compare the whole parameters."""
    if dist.get_rank() == 0:
        folder.mkdir()
    dist.barrier()
    run = Run(layout=layout, steps=2, config=MODEL)
    saved: Parts = {}

    def save(chunks: Chunks) -> None:
        saved.update(read_parts(chunks, layout))
        dist_checkpointing.save(chunks[0].sharded_state_dict(), str(folder))

    decisions: list[Planned] = []

    def use_llep(chunks: Chunks) -> None:
        if saved_with_llep:
            note_decisions(convert_model(chunks, EAGER), decisions)

    train(run, transform_model=use_llep, observe=save)
    assert any(len(each.plan.transfers) > 0 for each in decisions) == saved_with_llep
    with use_layout(other):
        chunks = build_model(make_config(Run(layout=other, config=MODEL)), Run(layout=other))
        if not saved_with_llep:
            convert_model(chunks, EAGER)
        untrained = read_parts(chunks, other)
        loaded = dist_checkpointing.load(chunks[0].sharded_state_dict(), str(folder))
        chunks[0].load_state_dict(loaded)
        parts = read_parts(chunks, other)
    whole = join(saved)
    for name, (tensor, shard) in parts.items():
        assert torch.equal(tensor, shard.cut(whole[name])), f"{name} from {layout} to {other}"
    assert any(not torch.equal(parts[name][0], untrained[name][0]) for name in parts)


def read_parts(chunks: Chunks, layout: Layout) -> Parts:
    """This rank's parameters by global name, and which part of the whole each is."""
    return {
        each.name: (each.parameter.detach().clone(), each.shard)
        for each in list_parameters(chunks, layout)
    }


def join(parts: Parts) -> dict[str, torch.Tensor]:
    """Whole parameters by global name, from the parts of all ranks."""
    everyone: list[Parts] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, parts)
    pieces: dict[str, dict[int, tuple[torch.Tensor, Shard]]] = {}
    for rank in everyone:
        for name, (tensor, shard) in rank.items():
            pieces.setdefault(name, {})[shard.index] = (tensor, shard)
    return {
        name: _join_one([found[index] for index in sorted(found)]) for name, found in pieces.items()
    }


def _join_one(found: list[tuple[torch.Tensor, Shard]]) -> torch.Tensor:
    shard = found[0][1]
    assert len(found) == shard.count
    strided = [tensor.chunk(shard.stride, shard.dim) for tensor, _ in found]
    return torch.cat(
        [piece for pieces in zip(*strided, strict=True) for piece in pieces], shard.dim
    )
