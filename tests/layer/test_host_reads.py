"""The host waits for the GPU once a layer and forward: for the count table.

On a CPU, tensors are marked as being on the device (see support.host_reads). On a GPU,
torch is told to raise where it waits; waits for events, which it does not see, are counted.
"""

import contextlib
import re
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_llep.config import LLEPConfig
from megatron_llep.integration.convert import convert_model
from megatron_llep.placement.forward import Planned, Routed, read
from support.host_reads import HostReads, run_backward
from support.layout import Layout, use_layout
from support.llep import EAGER, note_decisions
from support.ranks import run_ranks
from support.routing import Routing, force_routing
from support.training import Run, build_model, make_config

SHARED = {"moe_shared_expert_intermediate_size": 32, "moe_shared_expert_overlap": True}
RECOMPUTED = {"recompute_granularity": "selective", "recompute_modules": ["moe"]}


def build_layer(run: Run, llep: LLEPConfig) -> torch.nn.Module:
    chunks = build_model(make_config(run), run)
    convert_model(chunks, llep)
    force_routing(chunks, run.routing)
    return chunks[0].decoder.layers[0].mlp


def run_layer(layer: torch.nn.Module, hidden: torch.Tensor) -> None:
    output, _ = layer(hidden)
    run_backward(output, torch.ones_like(output))


@pytest.mark.parametrize(
    ("layout", "config", "foreign_weights", "forwards"),
    [
        (Layout(ep=2), {}, "keep", 1),
        (Layout(ep=2), {}, "refetch", 1),
        (Layout(tp=2, ep=2, etp=2), {}, "keep", 1),
        (Layout(ep=2, dp=4), SHARED, "keep", 1),
        (Layout(ep=2), RECOMPUTED, "keep", 2),
    ],
    ids=["keep", "refetch", "expert-tp", "shared-experts", "recomputed"],
)
def test_one_read_a_forward(layout, config, foreign_weights, forwards):
    def work(rank, size):
        run = Run(layout=layout, routing=Routing("hot"), config=config)
        with use_layout(layout):
            layer = build_layer(run, replace(EAGER, foreign_weights=foreign_weights))
            planned: list[Planned] = []
            note_decisions([layer], planned)
            hidden = torch.randn(32, 2, layer.config.hidden_size, requires_grad=True)
            with HostReads([hidden, *layer.parameters(), *layer.buffers()]) as reads:
                run_layer(layer, hidden)
            assert planned[-1].plan.max_foreign > 0
            return reads.found, reads.collectives.count("_allgather_base_")

    for reads, gathers in run_ranks(work, layout.world_size):
        # Where a kernel places pairs on a GPU, a loop of the host reads them on a CPU.
        placed = [each for each in reads if re.search(r"^numpy at .*/placement/tokens\.py:", each)]
        assert len(placed) == forwards, reads
        found = [each for each in reads if each not in placed]
        assert len(found) == forwards, found
        assert all(re.search(r"numpy at .*/counting\.py:\d+", each) for each in found), found
        if layout.tp == 1:  # else the experts' input is gathered too
            assert gathers == forwards, "counts are gathered more than once"


def test_counts_of_another_map_are_not_used():
    """A forward that ended early leaves its counts behind; the next one must not plan from them."""

    def work(rank, size):
        run = Run(layout=Layout(ep=2), routing=Routing("natural"))
        with use_layout(run.layout):
            layer = build_layer(run, EAGER)
            hidden = torch.randn(2, 8, 2, layer.config.hidden_size)
            planned: list[Planned] = []
            note_decisions([layer], planned)
            layer.route(hidden[0])
            probs, routing_map = layer.router(hidden[1])
            layer.preprocess(hidden[1], probs, routing_map)
            assert planned[-1].counts[rank].tolist() == routing_map.sum(0).tolist()
            probs, routing_map = layer.route(hidden[0])
            listed = read(Routed, routing_map).pairs
            layer.preprocess(hidden[0], probs, routing_map)
            assert planned[-1].pairs is listed
            assert planned[-1].counts[rank].tolist() == routing_map.sum(0).tolist()

    run_ranks(work, 2)


READS = {
    "item": lambda x: x.sum().item(),
    "tolist": lambda x: x.tolist(),
    "numpy": lambda x: x.detach().numpy(),
    "bool": lambda x: bool(x.any()),
    "size": lambda x: torch.empty(x.long()[0]),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "repeat": lambda x: torch.arange(3).repeat_interleave(x.long()),
    "cpu": lambda x: x.cpu().numpy(),
    "to": lambda x: x.to("cpu"),
    "copy": lambda x: torch.empty(3).copy_(x, non_blocking=True),
}


@pytest.mark.parametrize("name", READS)
def test_reads_are_found(name):
    """Also of tensors computed from a marked one."""
    source = torch.tensor([1.0, 2.0, 0.0])
    with HostReads([source]) as reads:
        READS[name]((source + 1) * 2)
    assert len(reads.found) == 1, reads.found
    assert "test_host_reads.py" in reads.found[0]


def test_reads_in_backward_are_found():
    source = torch.tensor([1.0, 2.0, 0.0], requires_grad=True)
    with HostReads([source]) as reads:
        output = 2 * source
        output.register_hook(lambda grad: print(grad.tolist()))
        run_backward(output, torch.ones_like(output))
    assert len(reads.found) == 1, reads.found


def test_work_on_the_device_is_no_read():
    source = torch.tensor([1.0, 2.0, 0.0])
    with HostReads([source]) as reads:
        source.nonzero_static(size=3)
        torch.arange(3).repeat_interleave(source.long(), output_size=3)
        source.add_(torch.ones(3))
        assert len(source.new_zeros(2).copy_(source[:2])) == 2
    assert reads.found == []


@contextlib.contextmanager
def be_one_of_two(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process group in which the other rank has the same counts and sends zeros."""

    def gather(output, input, group=None, async_op=False):
        output.view(-1, *input.shape).copy_(input)
        return SimpleNamespace(wait=lambda: True)

    def exchange(output, input, *args, async_op=False, **kwargs):
        output.zero_()
        return SimpleNamespace(wait=lambda: True)

    monkeypatch.setattr(dist, "all_gather_into_tensor", gather)
    monkeypatch.setattr(dist, "all_to_all_single", exchange)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.mark.gpu
@pytest.mark.parametrize("foreign_weights", ["keep", "refetch"])
def test_one_wait_a_forward_on_a_gpu(foreign_weights, monkeypatch):
    run = Run(layout=Layout(ep=2), routing=Routing("natural"))
    with be_one_of_two(monkeypatch), use_layout(run.layout):
        layer = build_layer(run, replace(EAGER, foreign_weights=foreign_weights)).cuda()
        hidden = torch.randn(64, 2, layer.config.hidden_size, device="cuda").requires_grad_()
        planned: list[Planned] = []
        note_decisions([layer], planned)
        run_layer(layer, hidden)  # compiles kernels, and takes memory
        assert planned[-1].plan.max_foreign > 0
        waits = 0
        synchronize = torch.cuda.Event.synchronize

        def count_and_wait(event):
            nonlocal waits
            waits += 1
            synchronize(event)

        monkeypatch.setattr(torch.cuda.Event, "synchronize", count_and_wait)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            run_layer(layer, hidden)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert waits == 1
