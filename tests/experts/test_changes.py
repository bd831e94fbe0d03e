"""What others do to experts is noticed at the next forward, and not forward by forward."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from megatron_llep import convert_model
from megatron_llep.experts.changes import SeenExperts
from support.layout import Layout, use_layout
from support.llep import EAGER
from support.ranks import run_ranks
from support.routing import Routing
from support.training import Run, build_model, make_config, make_tokens

RUN = Run(layout=Layout(ep=2), routing=Routing("hot"))


def make_experts() -> nn.Module:
    experts = nn.Module()
    experts.local_experts = nn.ModuleList(
        nn.ModuleDict({"fc1": nn.Linear(2, 2), "fc2": nn.Linear(2, 2)}) for _ in range(3)
    )
    return experts


def test_the_same_experts_are_looked_at_once():
    experts = make_experts()
    seen = SeenExperts()
    assert seen.have_changed(experts)
    assert not seen.have_changed(experts)
    experts.to(torch.bfloat16)
    for parameter in experts.parameters():
        parameter.requires_grad = False
    assert not seen.have_changed(experts)


def wrap(experts: nn.Module) -> nn.Module:
    for expert in experts.local_experts:
        expert["fc2"] = nn.Sequential(expert["fc2"])
    return experts


def parametrize(experts: nn.Module) -> nn.Module:
    for expert in experts.local_experts:
        nn.utils.parametrizations.weight_norm(expert["fc1"])
    return experts


CHANGES = {
    "wrapped": wrap,
    "parametrized": parametrize,
    "inside another": lambda experts: nn.Sequential(experts),
    "others": lambda experts: make_experts(),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_noticed_once(name):
    experts = make_experts()
    seen = SeenExperts()
    seen.have_changed(experts)
    changed = CHANGES[name](experts)
    assert seen.have_changed(changed)
    assert not seen.have_changed(changed)


def test_weights_sharded_after_llep_are_refused():
    def work(rank, size):
        with use_layout(RUN.layout):
            (chunk,) = convert_model(build_model(make_config(RUN), RUN), EAGER)
            fully_shard(chunk.decoder.layers[0], mesh=init_device_mesh("cpu", (size,)))
            tokens = make_tokens(RUN, 0, rank)[:, :-1]
            with pytest.raises(ValueError, match=r"FSDP shards .* --use-distributed-optimizer"):
                chunk(tokens, torch.arange(tokens.shape[1]).expand_as(tokens), None)
        dist.barrier()

    run_ranks(work, 2)
