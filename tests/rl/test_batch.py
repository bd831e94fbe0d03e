"""Micro-batches of a rollout, and routing that training repeats, with LLEP.

Letters: b sequences, s tokens, L layers, K experts of a token, E experts.
"""

from argparse import Namespace
from dataclasses import replace

import pytest
import torch

from megatron_llep.integration.convert import convert_model
from megatron_llep.training import step
from megatron_llep.training.rl import step as rl_step
from megatron_llep.training.rl.batch import Sample, make_micro_batches
from megatron_llep.training.rl.replay import (
    pad_routing,
    record_routing,
    start_replay,
    stop_replay,
)
from megatron_llep.training.rl.step import get_negative_logprobs
from support.layout import Layout, use_layout
from support.llep import EAGER, note_decisions
from support.ranks import run_ranks
from support.training import Run, build_model, make_config

E, L, K = 8, 2, 2
STEP_ARGS = Namespace(
    grpo_clamp_eps_lower=0.2,
    grpo_clamp_eps_upper=0.2,
    calculate_per_token_loss=False,
    check_for_nan_in_loss_and_grad=False,
    check_for_spiky_loss=False,
)
SETTINGS = {"pad_id": 63, "num_experts": E, "sequence_parallel": False}


def sample(prompt, answer, advantage=0.0, routing=None):
    return Sample(prompt=prompt, answer=answer, advantage=advantage, routing=routing)


def test_labels_of_answers_count():
    samples = [sample([1, 2, 3], [4, 5], 0.5), sample([6], [7], -0.5), sample([8], [9, 10])]
    samples.append(samples[0])
    first, second = make_micro_batches(samples, 2, multiple_of=1, **SETTINGS)
    assert first.tokens.tolist() == [[1, 2, 3, 4], [6, 7, 63, 63]]
    assert first.labels.tolist() == [[2, 3, 4, 5], [7, 63, 63, 63]]
    assert first.mask.tolist() == [[0, 0, 1, 1], [1, 0, 0, 0]]
    assert first.advantages.tolist() == [0.5, -0.5]
    assert second.mask.tolist() == [[1, 1, 0, 0], [0, 0, 1, 1]]
    (whole,) = make_micro_batches(samples, 4, multiple_of=3, **SETTINGS)
    assert whole.tokens.shape == (4, 6)
    assert whole.mask.sum(dim=1).tolist() == [2, 1, 2, 2]


def test_padding_goes_to_all_experts():
    routing = pad_routing(torch.zeros(1, L, K, dtype=torch.int16), 9, E)
    assert routing.shape == (9, L, K)
    assert (routing[1:, :, 0] != routing[1:, :, 1]).all()
    assert routing[1:].flatten().bincount().tolist() == [2 * L] * E


def make_samples(rank: int, number: int) -> list[Sample]:
    """With a routing that is not the model's own."""
    generator = torch.Generator().manual_seed(rank)
    samples = []
    for length in (3, 6, 4, 5)[:number]:
        routing = torch.rand(length + 1, L, E, generator=generator).topk(K, dim=-1).indices % 5
        routing[..., 1] = (routing[..., 0] + 1 + routing[..., 1] % 3) % 5  # a token's differ
        tokens = torch.randint(60, (length + 2,), generator=generator).tolist()
        samples.append(sample(tokens[:length], tokens[length:], 1.0, routing.to(torch.int16)))
    return samples


@pytest.mark.parametrize("recompute", [False, True], ids=["", "recompute"])
@pytest.mark.parametrize("layout", [Layout(ep=2), Layout(tp=2, ep=2, etp=1)], ids=str)
def test_llep_obeys_a_replayed_routing_in_forward_and_backward(layout, recompute, monkeypatch):
    for module in (rl_step, step):
        monkeypatch.setattr(module, "get_args", lambda: STEP_ARGS)
    config = {"moe_enable_routing_replay": True}
    if recompute:
        config |= {"recompute_granularity": "selective", "recompute_modules": ["moe"]}
    run = Run(layout=layout, config=config)

    def work(rank, size):
        decisions = []
        with use_layout(layout):
            (model,) = build_model(make_config(run), run)
            note_decisions(convert_model([model], EAGER), decisions)
            samples = make_samples(rank if layout.tp == 1 else 0, 4)
            batches = make_micro_batches(
                samples, 2, multiple_of=layout.tp, **SETTINGS | {"sequence_parallel": layout.tp > 1}
            )
            mine = [0, 1] if layout.tp == 2 else [rank]  # sources of these samples' tokens
            for number, batch in enumerate(batches):  # one after another, as in a step
                decisions.clear()
                routings = [
                    pad_routing(each.routing, batch.tokens.shape[1], E)
                    for each in samples[2 * number : 2 * number + 2]
                ]
                batch = replace(batch, old_logprobs=torch.zeros_like(batch.mask))
                output, get_loss = rl_step.forward_step(iter([batch]), model)
                loss, _, _ = get_loss(output)
                loss.backward()
                assert len(decisions) == (2 * L if recompute else L)
                order = [*range(L), *reversed(range(L))]
                for layer, decision in zip(order, decisions, strict=False):
                    routed = torch.cat([routing[:, layer].flatten() for routing in routings])
                    expected = routed.long().bincount(minlength=E)
                    assert decision.counts[mine].sum(axis=0).tolist() == expected.tolist()
                assert not any(decision.plan.is_fallback for decision in decisions)
            stop_replay()
            decisions.clear()
            get_negative_logprobs(model, batches[0])
            natural = [decision.counts[rank].tolist() for decision in decisions]
            assert natural != [
                rows.flatten().bincount(minlength=E).tolist() for rows in batches[0].routing
            ]

    run_ranks(work, 2)


def test_recorded_rows_are_repeated_after_the_weights_have_changed():
    run = Run(layout=Layout(ep=2), config={"moe_enable_routing_replay": True})

    def work(rank, size):
        decisions = []
        with use_layout(run.layout):
            (model,) = build_model(make_config(run), run)
            note_decisions(convert_model([model], EAGER), decisions)
            samples = make_samples(rank, 4)
            (batch,) = make_micro_batches(samples, 4, multiple_of=1, **SETTINGS)
            with torch.no_grad(), record_routing() as rows:
                get_negative_logprobs(model, batch)
            recorded = [decision.counts for decision in decisions]
            assert len(rows) == L
            with torch.no_grad():
                for layer in model.decoder.layers:
                    layer.mlp.router.weight.neg_()
            for repeats in (False, True):
                decisions.clear()
                if repeats:
                    start_replay(rows)
                get_negative_logprobs(model, batch)
                same = [
                    (decision.counts == counts).all()
                    for decision, counts in zip(decisions, recorded, strict=True)
                ]
                assert same == [repeats] * L

    run_ranks(work, 2)
