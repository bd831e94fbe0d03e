"""Ranks that share tokens but run different numbers of forwards are told so, on all of them."""

import pytest
import torch
from megatron.core.tensor_parallel.random import CheckpointFunction, detach_variable

from megatron_llep.integration.convert import convert_model
from support.layout import Layout, use_layout
from support.llep import EAGER
from support.ranks import run_ranks
from support.training import Run, build_model, make_config, make_tokens

RUN = Run(layout=Layout(ep=2))
RECOMPUTING = Run(
    layout=Layout(ep=2),
    config={
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
)


def build(run: Run) -> torch.nn.Module:
    return convert_model(build_model(make_config(run), run), EAGER)[0]


def forward(model: torch.nn.Module, rank: int) -> torch.Tensor:
    tokens = make_tokens(RUN, 0, rank)
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    return model(
        inputs, torch.arange(inputs.shape[1]).expand_as(inputs), None, labels=labels
    ).mean()


def evaluate(model: torch.nn.Module, rank: int) -> None:
    model.eval()
    with torch.no_grad():
        forward(model, rank)
    model.train()


def one_rank_evaluates_once_more(rank: int) -> None:
    model = build(RUN)
    for _ in range(2 + rank):
        evaluate(model, rank)
    forward(model, rank)


def one_rank_computes_probabilities_in_training_mode(rank: int) -> None:
    model = build(RUN)
    if rank == 1:
        with torch.no_grad():
            forward(model, rank)
    forward(model, rank)


def one_rank_asks_the_reference_once_more(rank: int) -> None:
    """The same layers, for the same purpose, and with the same groups."""
    reference, policy = build(RUN), build(RUN)
    for _ in range(2 + rank):
        evaluate(reference, rank)
    evaluate(policy, rank)


def one_rank_has_no_backward(rank: int) -> None:
    model = build(RECOMPUTING)
    loss = forward(model, rank)
    if rank == 0:
        loss.backward()
    else:
        forward(model, rank)


@pytest.mark.parametrize(
    ("work", "said"),
    [
        (
            one_rank_evaluates_once_more,
            [
                "ranks [0]: layer 1, training, forward 5 of",
                "ranks [1]: layer 1, evaluation, without gradients, forward 5 of",
            ],
        ),
        (
            one_rank_computes_probabilities_in_training_mode,
            ["ranks [1]: layer 1, training, without gradients, forward 1 of"],
        ),
        (
            one_rank_asks_the_reference_once_more,
            [
                "ranks [0]: layer 1, evaluation, without gradients, forward 1 of",
                "ranks [1]: layer 1, evaluation, without gradients, forward 5 of",
            ],
        ),
        (
            one_rank_has_no_backward,
            ["ranks [0]: layer 2, training, recomputed", "ranks [1]: layer 1, training"],
        ),
    ],
)
def test_both_say_where_each_is(work, said):
    def run(rank, size):
        with (
            use_layout(RUN.layout),
            pytest.raises(RuntimeError, match="in different forwards") as caught,
        ):
            work(rank)
        return str(caught.value)

    first, second = run_ranks(run, 2)
    assert first == second
    for part in said:
        assert part in first


def recompute_unmarked(ctx, *grads):
    """A backward of Megatron's checkpoint that does not tell Megatron of it, as verl puts in."""
    inputs = detach_variable(ctx.saved_tensors)
    with torch.enable_grad():
        outputs = ctx.run_function(*inputs)
    outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
    pairs = [
        pair
        for pair in zip(outputs, grads, strict=True)
        if torch.is_tensor(pair[0]) and pair[0].requires_grad
    ]
    torch.autograd.backward(*zip(*pairs, strict=True))
    return (None, None, *(getattr(each, "grad", None) for each in inputs))


@pytest.mark.parametrize("is_patched", [False, True], ids=["Megatron's", "patched"])
def test_a_recomputed_micro_batch_counts_once(is_patched):
    def fail(*args):
        raise KeyError("the cause")

    def work(rank, size):
        with use_layout(RUN.layout), pytest.MonkeyPatch.context() as monkeypatch:
            if is_patched:
                monkeypatch.setattr(
                    CheckpointFunction, "backward", staticmethod(recompute_unmarked)
                )
            model = build(RECOMPUTING)
            for _ in range(2):
                forward(model, rank).backward()
            model.decoder.layers[0].mlp.experts.forward = fail
            with pytest.raises(KeyError) as caught:
                forward(model, rank)
        return caught.value.__notes__

    for (note,) in run_ranks(work, 2):
        assert "forward of layer 1, micro-batch 3 since the start" in note
