"""On GPUs: transfers beside the layer, with random delays on both streams, change no number.

Ranks share a GPU over gloo where there are fewer GPUs than ranks; else they use NCCL.
"""

import contextlib
import os
import random
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from layer.test_layer_float64 import TOLERANCE, H, T, build_layer
from megatron_llep.config import LLEPConfig
from megatron_llep.integration.convert import convert_model
from megatron_llep.lending import shared
from megatron_llep.lending.side_stream import SideStream
from support.comparison import get_relative_difference
from support.layout import Layout, use_layout
from support.llep import EAGER
from support.spread import use_spread_experts

pytestmark = pytest.mark.gpu

LONGEST_DELAY = 5_000_000
"""Cycles, some milliseconds: much longer than any step of so small a layer."""
STEPS = 6


class SlowStream(SideStream):
    """A side stream that is late at random, as is the stream that it is beside.

    Memory that is let go too early is soon filled with NaN.
    """

    draw = random.Random(0)
    joins = True

    def dawdle(self) -> None:
        if self.draw.random() < 0.7:
            torch.cuda._sleep(self.draw.randrange(LONGEST_DELAY))

    def spoil_free_memory(self) -> None:
        for _ in range(4):
            torch.full((self.draw.choice((600, 1200, 3600, 9600)),), torch.nan, device="cuda")

    @contextlib.contextmanager
    def begin(self):
        self.dawdle()
        with super().begin():
            yield
        self.spoil_free_memory()
        self.dawdle()

    @contextlib.contextmanager
    def resume(self):
        with super().resume():
            self.dawdle()
            yield
            self.dawdle()

    def join(self):
        if self.joins:
            super().join()
        self.spoil_free_memory()


class StreamThatIsNotWaitedFor(SlowStream):
    joins = False

    def dawdle(self) -> None:
        torch.cuda._sleep(LONGEST_DELAY)


def compare_late_layers(rank: int, world_size: int, llep: LLEPConfig, stream: type) -> float:
    """The largest difference from plain Megatron, over steps that change the weights."""
    stream.draw = random.Random(rank)
    layout, worst = Layout(ep=world_size), 0.0
    with use_layout(layout), pytest.MonkeyPatch.context() as monkeypatch:
        if world_size >= 4:
            use_spread_experts(monkeypatch)
        monkeypatch.setattr(shared, "SideStream", stream)
        skew = 0.0 if world_size >= 4 else 1.0
        layers = [build_layer(layout, rank, skew, moe_ffn_hidden_size=25).cuda() for _ in range(2)]
        convert_model(layers[1:], llep)
        generator = torch.Generator().manual_seed(rank)
        for _ in range(STEPS):
            hidden = torch.rand(T, 1, H, generator=generator, dtype=torch.float64).cuda()
            found = []
            for layer in layers:
                layer.zero_grad()
                inputs = hidden.clone().requires_grad_()
                output, _ = layer(inputs)
                output.square().sum().backward()
                # At once: whatever still reads the weights must not see this.
                with torch.no_grad():
                    for parameter in layer.parameters():
                        parameter.sub_(parameter.grad, alpha=1e-3)
                found.append([output.detach(), inputs.grad, *(p.grad for p in layer.parameters())])
            for expected, actual in zip(*found, strict=True):
                difference = get_relative_difference(actual, expected)
                worst = max(worst, difference if difference == difference else torch.inf)
    return worst


def be_a_rank(
    rank: int, world_size: int, folder: str, llep: LLEPConfig, stream: type[SlowStream]
) -> None:
    """Run in a process of its own: CUDA does not survive a fork."""
    num_gpus = torch.cuda.device_count()
    torch.cuda.set_device(rank % num_gpus)
    dist.init_process_group(
        "nccl" if num_gpus >= world_size else "gloo",
        store=dist.FileStore(f"{folder}/store", world_size),
        rank=rank,
        world_size=world_size,
    )
    worst = compare_late_layers(rank, world_size, llep, stream)
    Path(folder, str(rank)).write_text(repr(worst))
    dist.barrier()
    dist.destroy_process_group()


def run_on_gpus(world_size: int, llep: LLEPConfig, stream: type[SlowStream]) -> float:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setitem(os.environ, "CUDA_LAUNCH_BLOCKING", "0")
        torch.multiprocessing.spawn(be_a_rank, (world_size, folder, llep, stream), world_size)
        return max(float(Path(folder, str(rank)).read_text()) for rank in range(world_size))


@pytest.mark.parametrize("foreign_weights", ["keep", "refetch"])
@pytest.mark.parametrize(("world_size", "scatter_from"), [(2, 0), (4, 0), (4, 2)])
def test_delays_change_nothing(world_size, scatter_from, foreign_weights):
    llep = replace(EAGER, scatter_from=scatter_from, foreign_weights=foreign_weights)
    assert run_on_gpus(world_size, llep, SlowStream) <= TOLERANCE


def test_a_missing_wait_is_seen():
    llep = replace(EAGER, scatter_from=2)
    assert not run_on_gpus(4, llep, StreamThatIsNotWaitedFor) <= TOLERANCE
