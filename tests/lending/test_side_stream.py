"""Transfers and the layer on two streams: no memory is used by both without an order.

A CPU has no streams, so this follows the calls instead: every operation is noted with the stream
on which a GPU would run it, and with what that stream is known to be behind. Two uses of the same
memory, one of them a write, must be in order; memory is allocated and let go on the main stream.
"""

import contextlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from layer.test_layer_float64 import H, T, build_layer
from megatron_llep.integration.convert import convert_model
from megatron_llep.lending import shared
from megatron_llep.lending.loan import WeightLoan
from megatron_llep.lending.pending import PendingExchanges
from megatron_llep.lending.side_stream import SideStream
from support.layout import Layout, use_layout
from support.llep import EAGER
from support.ranks import run_ranks
from support.spread import use_spread_experts

MAIN, SIDE, NCCL, TOKENS = "main", "side", "nccl of weights", "nccl of tokens"
STREAMS = (MAIN, SIDE, NCCL, TOKENS)


class Streams:
    """Streams, each with a clock, and which clocks of the others each is behind."""

    def __init__(self) -> None:
        self.current = MAIN
        self.clock = {stream: dict.fromkeys(STREAMS, 0) for stream in STREAMS}
        # Storage -> (stream, its clock then, whether it wrote, what it was).
        self.uses: dict[int, list[tuple[str, int, bool, str]]] = defaultdict(list)
        self.kept: list[torch.UntypedStorage] = []  # so that no address is used twice
        self.races: list[str] = []

    @contextlib.contextmanager
    def on(self, stream: str) -> Iterator[None]:
        """Run what is within on this stream."""
        before, self.current = self.current, stream
        yield
        self.current = before

    def wait(self, waiting: str, other: str) -> None:
        """All that `waiting` does from now on comes after all that `other` has so far."""
        for stream, time in self.clock[other].items():
            self.clock[waiting][stream] = max(self.clock[waiting][stream], time)

    def use(self, tensor: torch.Tensor, writes: bool, what: str, stream: str | None = None) -> None:
        stream = stream or self.current
        self.clock[stream][stream] += 1
        storage = tensor.untyped_storage()
        if storage.nbytes() == 0:
            return
        known = self.clock[stream]
        earlier = self.uses[storage._cdata]
        if not earlier:
            self.kept.append(storage)
            if stream != MAIN:
                self.races.append(f"{what} on {stream}: memory was not allocated on main")
        for other, time, wrote, name in earlier:
            if other != stream and (writes or wrote) and known[other] < time:
                self.races.append(f"{what} on {stream} does not wait for {name} on {other}")
        earlier.append((stream, known[stream], writes, what))


class NoteUses(TorchDispatchMode):
    """Notes what every operation reads and writes."""

    def __init__(self, streams: Streams) -> None:
        super().__init__()
        self.streams = streams

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if "alltoall" in name or "allgather" in name:
            return result  # the exchange itself is noted by its caller
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        writes_first = name.endswith("_") or name == "set_"
        if name not in ("set_", "detach", "view", "slice", "split", "_unsafe_view", "expand"):
            for i, tensor in enumerate(tensors):
                self.streams.use(tensor, writes_first and i == 0, name)
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and not any(
                tensor.untyped_storage()._cdata == x.untyped_storage()._cdata for x in tensors
            ):
                self.streams.use(tensor, True, name)
        return result


class NotedStream(SideStream):
    """A side stream that only notes what waits for what."""

    streams: Streams
    begins_in_order = True
    joins = True

    @contextlib.contextmanager
    def begin(self):
        if self.begins_in_order:
            self.streams.wait(SIDE, MAIN)
        with self.resume():
            yield

    @contextlib.contextmanager
    def resume(self):
        with self.streams.on(SIDE):
            yield

    def way_back(self):
        return partial(self.streams.on, self.streams.current)

    def join(self):
        if self.joins:
            self.streams.wait(MAIN, SIDE)


class NotedWork:
    """An exchange on a stream of NCCL's: behind the current stream at the call."""

    def __init__(self, streams, work, stream):
        self.streams, self.work, self.stream = streams, work, stream

    def wait(self):
        self.work.wait()
        self.streams.wait(self.streams.current, self.stream)


def find_races(rank, size, llep, broken):
    streams = Streams()
    behind_tokens: list[bool] = []  # of each exchange of weights or gradients
    exchange = dist.all_to_all_single

    def note_exchange(incoming, outgoing, *args, **kwargs):
        work = exchange(incoming, outgoing, *args, **kwargs)
        if work is None:  # Megatron's own, on the current stream
            return None
        stream = NCCL if kwargs["group"] is layer.lending_group else TOKENS
        if stream == NCCL:
            behind_tokens.append(streams.clock[SIDE][TOKENS] == streams.clock[TOKENS][TOKENS])
        streams.wait(stream, streams.current)
        streams.use(outgoing, False, "exchange", stream)
        streams.use(incoming, True, "exchange", stream)
        return NotedWork(streams, work, stream)

    def note_finish(transfer):
        buffers = transfer._buffers
        finish(transfer)
        for buffer in buffers:
            streams.use(buffer, True, "let go")

    def note_free(flat):
        streams.use(flat, True, "free")
        flat.untyped_storage().resize_(0)

    finish = PendingExchanges.finish

    class Stream(NotedStream):
        begins_in_order = broken != "begin"
        joins = broken != "join"

    Stream.streams = streams
    with use_layout(Layout(ep=4)), pytest.MonkeyPatch.context() as monkeypatch:
        use_spread_experts(monkeypatch)
        monkeypatch.setattr(shared, "SideStream", Stream)
        monkeypatch.setattr(PendingExchanges, "finish", note_finish)
        monkeypatch.setattr(WeightLoan, "_free", staticmethod(note_free))
        layer = build_layer(Layout(ep=4), rank, 0.0)
        convert_model([layer], llep)
        monkeypatch.setattr(dist, "all_to_all_single", note_exchange)
        for parameter in layer.parameters():
            streams.use(parameter, True, "initialize")
        generator = torch.Generator().manual_seed(rank)
        with NoteUses(streams):
            for _ in range(2):
                hidden = torch.rand(T, 1, H, generator=generator, dtype=torch.float64)
                output, _ = layer(hidden.requires_grad_())
                output.sum().backward()
                with torch.no_grad():
                    for parameter in layer.parameters():
                        parameter.sub_(parameter.grad)
    beside = sum(use[0] != MAIN for uses in streams.uses.values() for use in uses)
    return streams.races, beside, behind_tokens


SETTINGS = [
    {"scatter_from": scatter_from, "foreign_weights": foreign_weights}
    for scatter_from in (0, 2)
    for foreign_weights in ("keep", "refetch")
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_no_race(settings):
    for races, beside, behind_tokens in run_ranks(find_races, 4, replace(EAGER, **settings), None):
        assert races == []
        assert beside > 0
        assert not behind_tokens[0], "the side stream waits for the exchange of tokens"


def list_starts(rank, size):
    """On which stream each exchange of weights or gradients was started."""
    streams, started = Streams(), []

    class Stream(NotedStream):
        @contextlib.contextmanager
        def begin(self):
            started.append(streams.current)
            with super().begin():
                yield

    Stream.streams = streams
    with use_layout(Layout(ep=2)), pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(shared, "SideStream", Stream)
        layer = build_layer(Layout(ep=2), rank, 1.0)
        convert_model([layer], replace(EAGER, foreign_weights="refetch"))
        hidden = torch.rand(T, 1, H, dtype=torch.float64)
        rows, probs = layer.preprocess(hidden, *layer.route(hidden))
        with streams.on("tokens"):
            rows, probs = layer.dispatch(rows, probs)
        computed, _ = layer.routed_experts_compute(rows, probs)
        leaf = computed.detach().requires_grad_()
        with streams.on("tokens"):
            output = layer.postprocess(layer.combine(leaf), None)
            output.sum().backward()
        computed.backward(leaf.grad)
    return started


def test_weights_are_fetched_again_on_the_main_stream():
    """Where a schedule exchanges tokens on another one."""
    # Fetched, fetched again, returned.
    assert run_ranks(list_starts, 2) == [[MAIN] * 3] * 2


@pytest.mark.parametrize("broken", ["begin", "join"])
def test_a_missing_wait_is_seen(broken):
    llep = replace(EAGER, scatter_from=2)
    assert any(races for races, *_ in run_ranks(find_races, 4, llep, broken))
