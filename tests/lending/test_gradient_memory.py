"""Gradients of foreign experts take memory in backward alone, one layer's at a time.

Experts are large, tokens few, and gradients travel in bf16: what there is in fp32 is the slab in
which gradients of foreign experts add up, and little beside.
"""

import contextlib
from dataclasses import replace

import pytest
import torch

from megatron_llep.integration.convert import convert_model
from megatron_llep.layer import LLEPMoELayer
from megatron_llep.lending.grad_scratch import GradScratch
from megatron_llep.lending.loan import WeightLoan
from support.layout import Layout, use_layout
from support.live_storages import LiveStorages
from support.llep import EAGER
from support.ranks import run_ranks
from support.routing import Routing, force_routing
from support.training import Run, build_model, make_config, make_tokens

LLEP = replace(EAGER, grad_dtype="param")
RUN = Run(
    layout=Layout(ep=2),
    # The hot expert of layers 0, 1 and 3 is rank 0's, that of layer 2 rank 1's.
    routing=Routing("hot"),
    micro_batch_size=1,
    sequence_length=4,
    config={
        "num_layers": 4,
        "hidden_size": 128,
        "moe_ffn_hidden_size": 256,
        "params_dtype": torch.bfloat16,
        "bf16": True,
    },
)
SLAB = 4 * 3 * 128 * 256
"""Bytes of one expert's gradients in fp32: every layer lends one expert."""
SMALL = SLAB // 2


class Model:
    """A rank's model, in a block that follows what it allocates."""

    def __init__(self, live: LiveStorages) -> None:
        (self.module,) = build_model(make_config(RUN), RUN)
        convert_model([self.module], LLEP)
        force_routing([self.module], RUN.routing)
        self.live = live

    def forward(self, number: int) -> torch.Tensor:
        tokens = make_tokens(RUN, 0, number)
        inputs, labels = tokens[:, :-1], tokens[:, 1:]
        positions = torch.arange(inputs.shape[1]).expand_as(inputs)
        return self.module(inputs, positions, None, labels=labels).mean()

    def take_gradients(self) -> list[torch.Tensor]:
        grads = [p.grad for p in self.module.parameters() if p.grad is not None]
        self.module.zero_grad()
        return grads

    def release(self) -> None:
        layers = [layer for layer in self.module.modules() if isinstance(layer, LLEPMoELayer)]
        layers[0].shared_lending.grad_scratch.release()


@contextlib.contextmanager
def use_model():
    with use_layout(RUN.layout), LiveStorages(torch.float32) as live:
        model = Model(live)
        live.take_peak()
        yield model


def test_forward_takes_none():
    def work(rank, size):
        with pytest.MonkeyPatch.context() as monkeypatch, use_model() as model:
            handed_out = []
            hand_out = WeightLoan.hand_out

            def note(loan):
                foreign = hand_out(loan)
                handed_out.extend(weight for weights in foreign for weight in weights)
                return foreign

            monkeypatch.setattr(WeightLoan, "hand_out", note)
            for training, with_grad in [(True, False), (False, False), (False, True), (True, True)]:
                model.module.train(training)
                with torch.set_grad_enabled(with_grad):
                    loss = model.forward(rank)
                assert handed_out
                for weight in handed_out:
                    assert hasattr(weight, "main_grad") == with_grad
                    if with_grad:
                        assert weight.main_grad.shape == weight.shape
                        assert weight.main_grad.dtype == torch.float32
                        assert weight.main_grad.device == weight.device
                handed_out.clear()
                del loss
                assert model.live.take_peak() < SMALL
        return True

    assert all(run_ranks(work, 2))


def test_layers_use_one_slab_in_turn():
    def work(rank, size):
        with use_model() as model:
            for micro_batch in range(2):
                loss = model.forward(2 * micro_batch + rank)
                loss.backward()
                del loss
                assert SLAB <= model.live.take_peak() < SLAB + SMALL
                assert SLAB <= model.live.alive() < SLAB + SMALL  # kept
            model.release()
            assert model.live.alive() < SMALL

    run_ranks(work, 2)


def test_two_returns_at_once():
    """Each has a slab of its own, and the gradients are those of one after the other."""

    def work(rank, size):
        with use_model() as model:
            for number in (rank, 2 + rank):
                model.forward(number).backward()
            expected = model.take_gradients()
            assert model.live.take_peak() < SLAB + SMALL

            losses = [model.forward(number) for number in (rank, 2 + rank)]
            with pytest.MonkeyPatch.context() as monkeypatch:
                start_return = WeightLoan.start_return

                def start_both(loan):
                    start_return(loan)
                    monkeypatch.undo()
                    losses[1].backward()

                monkeypatch.setattr(WeightLoan, "start_return", start_both)
                losses[0].backward()
            # It is layer 3 whose return is open all along, in which rank 1 borrows.
            slabs = 1 + rank
            assert slabs * SLAB <= model.live.take_peak() < slabs * SLAB + SMALL
            losses.clear()
            assert SLAB <= model.live.alive() < SLAB + SMALL
            for actual, grad in zip(model.take_gradients(), expected, strict=True):
                torch.testing.assert_close(actual, grad)

    run_ranks(work, 2)


def test_a_backward_that_fails_gives_its_slab_back():
    def work(rank, size):
        with use_model() as model:
            loss = model.forward(rank)
            with pytest.MonkeyPatch.context() as monkeypatch:

                def fail(loan, grads):
                    raise RuntimeError("on all ranks, before the return starts")

                monkeypatch.setattr(WeightLoan, "add_grads", fail)
                with pytest.raises(RuntimeError, match="on all ranks"):
                    loss.backward()
            del loss
            assert model.live.alive() < SLAB + SMALL
            loss = model.forward(rank)
            loss.backward()
            del loss
            assert model.live.take_peak() < SLAB + SMALL

    run_ranks(work, 2)


def test_scratch():
    scratch, like = GradScratch(), torch.empty(0)
    first = scratch.open(10, like=like)
    second = scratch.open(20, like=like)
    assert first.data_ptr() != second.data_ptr()
    assert (first.numel(), second.numel()) == (10, 20)
    addresses = first.data_ptr(), second.data_ptr()
    scratch.close(second)
    scratch.close(first)
    del first, second
    again = scratch.open(15, like=like)
    assert again.data_ptr() == addresses[1]
    assert again.numel() == 20
    scratch.close(again)
    assert scratch.open(1, like=like.double()).dtype == torch.float64
    assert scratch.open(1, like=like).data_ptr() == again.data_ptr()
    scratch.close(again)
    scratch.release()
    assert scratch.open(1, like=like).numel() == 1


def test_a_small_slab_is_freed_before_a_larger_one_is_allocated():
    scratch = GradScratch()
    with LiveStorages(torch.float32) as live:
        like = torch.empty(0)
        scratch.close(scratch.open(100, like=like))
        scratch.close(scratch.open(150, like=like))
        assert live.peak == 600
