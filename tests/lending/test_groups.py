"""LLEP's process groups: made by all ranks, in one order, once, like those they stand beside."""

from dataclasses import replace
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection

from megatron_llep import convert_model, with_llep
from megatron_llep.layer import LLEPMoELayer
from megatron_llep.lending import groups
from megatron_llep.lending.groups import LENDING, REPLICAS, copy_options, make_groups
from megatron_llep.lending.replicas import GroupRanks, _join
from support.chaos import watch_collectives
from support.layout import Layout, use_layout
from support.llep import EAGER, train_with_llep
from support.ranks import run_ranks
from support.routing import Routing
from support.training import Chunks, Run, build_model, make_config

SEAMS = ["model", "spec"]
# The first pipeline stage has no MoE layer.
ONE_STAGE = Run(
    layout=Layout(pp=2, ep=2),
    routing=Routing("hot"),
    steps=1,
    config={"num_layers": 2, "moe_layer_freq": [0, 1]},
)


def list_own_groups() -> list[str]:
    """What this rank's groups that LLEP made are for."""
    made = [group.group_desc for group in dist.distributed_c10d._world.pg_map]
    return [purpose for purpose in made if purpose.startswith("LLEP_")]


def make_ordinary_group(size: int) -> float:
    """All ranks make a group, as a script may at any time, and add up ones in it."""
    ones = torch.ones(1)
    dist.all_reduce(ones, group=dist.new_group(list(range(size))))
    return ones.item()


def switch_on(run: Run, llep, seam: str) -> Chunks:
    transform = (lambda spec: with_llep(spec, llep)) if seam == "spec" else None
    chunks = build_model(make_config(run), run, transform)
    return convert_model(chunks, llep) if seam == "model" else chunks


@pytest.mark.parametrize("seam", SEAMS)
def test_a_stage_without_moe_layers_takes_part(seam):
    def work(rank, size):
        loans = train_with_llep(ONE_STAGE, EAGER, seam).observed
        assert (loans.transfers > 0) == (rank >= 2)
        assert list_own_groups() == [LENDING] * (rank >= 2)
        assert make_ordinary_group(size) == size

    run_ranks(work, ONE_STAGE.layout.world_size)


@pytest.mark.parametrize("seam", SEAMS)
def test_replicas_where_a_stage_has_no_moe_layers(seam):
    run = replace(ONE_STAGE, layout=Layout(pp=2, ep=2, dp=4))

    def work(rank, size):
        with use_layout(run.layout):
            switch_on(run, replace(EAGER, replicas="expert-dp"), seam)
            assert sorted(list_own_groups()) == [LENDING, REPLICAS] * (rank >= 4)
            assert make_ordinary_group(size) == size

    run_ranks(work, run.layout.world_size)


@pytest.mark.parametrize("seam", SEAMS)
def test_virtual_stages_share_one_set(seam):
    """Of the first stage's chunks, the first has no MoE layer."""
    run = replace(
        ONE_STAGE,
        layout=Layout(pp=2, vpp=2, ep=2),
        config={"num_layers": 4, "moe_layer_freq": [0, 1, 1, 1]},
    )

    def work(rank, size):
        with use_layout(run.layout):
            chunks = switch_on(run, EAGER, seam)
            layers = [
                layer
                for each in chunks
                for layer in each.modules()
                if isinstance(layer, LLEPMoELayer)
            ]
            assert len(layers) == (1 if rank < 2 else 2)
            assert len({id(layer.lending_group) for layer in layers}) == 1
            assert list_own_groups() == [LENDING]
            assert make_ordinary_group(size) == size

    run_ranks(work, run.layout.world_size)


def test_made_once_for_as_long_as_the_groups_they_stand_beside(tmp_path):
    key = (LENDING, (0, 1))

    def make(**settings) -> dist.ProcessGroup:
        return make_groups({key: dist.new_group([0, 1], **settings)})[key]

    def work(rank, size):
        first = make()
        assert make() is first
        hurried = make(timeout=timedelta(seconds=9))
        assert hurried is not first
        assert groups._get_timeout(hurried) == timedelta(seconds=9)
        parallel_state.destroy_model_parallel()
        assert make() not in (first, hurried)
        dist.destroy_process_group()
        dist.init_process_group(
            "gloo", init_method=f"file://{tmp_path}/store", rank=rank, world_size=size
        )
        again = make()
        assert again.size() == 2
        assert make() is again

    run_ranks(work, 2)


def test_a_rank_that_misses_the_call_is_named_on_all():
    def work(rank, size):
        beside = dist.new_group([0, 1])
        with pytest.raises(ValueError, match=r"ranks \[0, 1\].* \[1\] have no MoE layer"):
            make_groups({(LENDING, (0, 1)): beside} if rank == 0 else {})
        assert make_ordinary_group(size) == size

    run_ranks(work, 3)


def test_weights_can_travel_from_the_first_loan_on():
    """A communicator takes its memory at the first exchange: at conversion, then."""

    def work(rank, size):
        run = Run(layout=Layout(ep=2))
        with use_layout(run.layout), watch_collectives() as calls:
            switch_on(run, EAGER, "model")
            first = [purpose for _, purpose, _ in calls].count(LENDING)
            switch_on(run, EAGER, "model")
        return first, [purpose for _, purpose, _ in calls].count(LENDING)

    assert run_ranks(work, 2) == [(1, 1)] * 2


class Options:
    """NCCL's, as far as they are read."""

    def __init__(self) -> None:
        self.is_high_priority_stream = False
        self.config = SimpleNamespace(max_ctas=None)
        self.group_name = "new"


@pytest.mark.parametrize(
    "kind", [Options, dist.ProcessGroupNCCL.Options] if dist.is_nccl_available() else [Options]
)
def test_options_are_those_of_the_expert_group(kind):
    options = kind()
    options.is_high_priority_stream = True
    options.config.max_ctas = 4
    options._timeout = timedelta(seconds=5)
    options.group_name = "expert parallel"
    copied = copy_options(options)
    assert copied is not options
    assert type(copied) is kind
    assert copied.is_high_priority_stream
    assert copied.config.max_ctas == 4
    assert copied._timeout == timedelta(seconds=5)
    assert copied.group_name != "expert parallel"
    assert copy_options(SimpleNamespace(_timeout=5)) is None  # gloo's


def test_the_lending_group_is_made_with_them(monkeypatch):
    made = []
    new_group = dist.new_group

    def note_and_make(*args, pg_options=None, **kwargs):
        made.append((pg_options, kwargs["timeout"]))
        return new_group(*args, **kwargs)  # gloo would not take NCCL's

    def work(rank, size):
        options = Options()
        options.config.max_ctas = 4
        options._timeout = timedelta(seconds=5)
        beside = dist.new_group([0, 1])
        monkeypatch.setattr(dist, "new_group", note_and_make)
        monkeypatch.setattr(groups, "_get_options", lambda group: options)
        make_groups({(LENDING, (0, 1)): beside})
        ((given, timeout),) = made
        assert given.config.max_ctas == 4
        assert timeout == timedelta(seconds=5)

    run_ranks(work, 2)


def test_ranks_in_another_order_are_refused_for_all():
    inside = [
        (GroupRanks(ep=ep, tp_ep=ep, expt_dp=expt_dp),)
        for ep, expt_dp in [((0, 2), (0, 1)), ((1, 3), (0, 1)), ((0, 2), (2, 3)), ((1, 3), (2, 3))]
    ]
    with pytest.raises(ValueError, match=r"not in ascending order; put expert data parallelism"):
        _join(inside[0][0], inside)


def test_a_layer_built_with_other_groups_is_refused():
    def work(rank, size):
        run = Run(layout=Layout(ep=2, dp=4))
        with use_layout(run.layout):
            prepared = get_default_pg_collection()
            across = [dist.new_group(ranks) for ranks in ([0, 2], [1, 3])]
            prepared.ep = prepared.tp_ep = across[rank % 2]
            with pytest.raises(ValueError, match=r"pg_collection=\.\.\."):
                build_model(make_config(run), run, lambda spec: with_llep(spec, EAGER, prepared))

    run_ranks(work, 4)
