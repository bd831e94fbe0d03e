"""Experts that are wrapped, adapted or sharded after LLEP was switched on are refused."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from megatron_llep import convert_model
from megatron_llep.experts.unchanged import UnchangedExperts
from megatron_llep.placement.forward import Planned
from support.layout import Layout, use_layout
from support.llep import EAGER, assert_same_run, note_decisions
from support.ranks import run_ranks
from support.routing import Routing
from support.training import Chunks, Run, build_model, make_config, make_tokens, train

RUN = Run(layout=Layout(ep=2), routing=Routing("hot"), steps=2)


class Adapter(nn.Module):
    """A linear layer of low rank beside another, which is frozen."""

    def __init__(self, linear: nn.Module):
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.down = nn.Parameter(torch.full((2, linear.weight.shape[1]), 0.1))
        self.up = nn.Parameter(torch.full((linear.weight.shape[0], 2), 0.1))

    def forward(self, hidden, *args):
        output, bias = self.linear(hidden, *args)
        return output + hidden @ self.down.T @ self.up.T, bias


def adapt(chunks: Chunks) -> None:
    for expert in chunks[0].decoder.layers[1].mlp.experts.local_experts:
        expert.linear_fc1 = Adapter(expert.linear_fc1)


def make_experts() -> nn.Module:
    experts = nn.Module()
    experts.local_experts = nn.ModuleList(
        nn.ModuleDict({"fc1": nn.Linear(2, 2), "fc2": nn.Linear(2, 2)}) for _ in range(3)
    )
    return experts


def test_unchanged_experts_pass():
    experts = make_experts()
    unchanged = UnchangedExperts(experts)
    for _ in range(2):
        unchanged.check(experts)
    experts.local_experts[0]["fc1"].weight = nn.Parameter(torch.ones(2, 2))  # as loading may
    experts.to(torch.bfloat16)
    for parameter in experts.parameters():
        parameter.requires_grad = False
    unchanged.check(experts)


def test_experts_on_the_meta_device_get_their_memory_later():
    with torch.device("meta"):
        experts = make_experts()
    unchanged = UnchangedExperts(experts)
    unchanged.check(experts.to_empty(device="cpu"))


def wrap_last(experts: nn.Module) -> nn.Module:
    experts.local_experts[2]["fc2"] = Adapter(experts.local_experts[2]["fc2"])
    return experts


def wrap_first(experts: nn.Module) -> nn.Module:
    experts.local_experts[0]["fc1"] = Adapter(experts.local_experts[0]["fc1"])
    return experts


def parametrize(experts: nn.Module) -> nn.Module:
    nn.utils.parametrizations.weight_norm(experts.local_experts[0]["fc1"])
    return experts


def quantise(experts: nn.Module) -> nn.Module:
    class Packed(nn.Parameter):
        pass

    experts.local_experts[1]["fc1"].weight = Packed(torch.ones(2, 2))
    return experts


CHANGES = {
    "experts": lambda experts: nn.Sequential(experts),
    "experts.local_experts.2.fc2": wrap_last,
    "experts.local_experts.0.fc1": wrap_first,
    "experts.local_experts.0.fc1 was a Linear": parametrize,
    "experts.local_experts.1.fc1.weight": quantise,
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_before_the_first_forward_is_named(name):
    experts = make_experts()
    unchanged = UnchangedExperts(experts)
    with pytest.raises(ValueError, match=f"{name}.*switch it on later, by convert_model"):
        unchanged.check(CHANGES[name](experts))


@pytest.mark.parametrize("change", [wrap_first, parametrize, CHANGES["experts"]])
def test_a_change_of_all_experts_is_found_at_any_forward(change):
    experts = make_experts()
    unchanged = UnchangedExperts(experts)
    unchanged.check(experts)
    with pytest.raises(ValueError, match="switch it on later"):
        unchanged.check(change(experts))


def test_adapters_after_llep_are_refused_and_before_it_train_as_plain_megatron():
    def work(rank, size):
        def convert_too_early(chunks: Chunks) -> None:
            convert_model(chunks, EAGER)
            adapt(chunks)

        with pytest.raises(ValueError, match=r"local_experts.0.linear_fc1 was a Column") as error:
            train(RUN, transform_model=convert_too_early)
        assert "forward of layer 2" in "".join(error.value.__notes__)

        decisions: list[Planned] = []

        def convert_last(chunks: Chunks) -> None:
            adapt(chunks)
            note_decisions(convert_model(chunks, EAGER), decisions)

        plain = train(RUN, transform_model=adapt)
        assert_same_run(train(RUN, transform_model=convert_last), plain)
        assert any(len(decision.plan.transfers) for decision in decisions)

    run_ranks(work, 2)


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
