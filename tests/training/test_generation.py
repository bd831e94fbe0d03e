"""Answers over a key-value cache are those of whole forwards, whatever the ranks' prompts.

Letters: b = prompts, t = tokens, V = vocabulary.
"""

from dataclasses import replace

import pytest
import torch

from megatron_llep.integration.convert import convert_model
from megatron_llep.training.generation import Generations, generate
from support.latent_attention import LATENT
from support.layout import Layout, use_layout
from support.llep import EAGER, note_decisions
from support.ranks import RankError, run_ranks
from support.routing import Routing, force_routing
from support.training import Run, build_model, make_config
from support.versions import needs_megatron

RUN = Run(layout=Layout(ep=2), sequence_length=32, config={"num_query_groups": 2})
NEW = 6
# A prompt a line, of ranks with many, one and none.
PROMPTS = ([[5, 9, 3], [7], [1, 2, 3, 4, 5, 6, 7], [9, 9]], [[8, 1, 60, 2]], [])
STOP = {11, 23, 40}


def build(run: Run, llep=None) -> torch.nn.Module:
    (model,) = build_model(make_config(run), run)
    if llep is not None:
        convert_model([model], llep)
    return model


def read_again(model, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """Logprobs [t, V] of the answer's tokens from one whole forward."""
    ids = torch.tensor([prompt + answer[:-1]])
    ids = torch.nn.functional.pad(ids, (0, -ids.shape[1] % model.config.tensor_model_parallel_size))
    positions = torch.arange(ids.shape[1]).unsqueeze(0)
    with torch.no_grad():
        logits = model(ids, positions, None, runtime_gather_output=True)
    logits = logits[0, len(prompt) - 1 : len(prompt) - 1 + len(answer)]
    return torch.log_softmax(logits.float(), dim=-1)


def assert_right(model, prompts, answers: Generations, rank: int, size: int) -> None:
    """The cached logprobs are those of whole forwards, which all ranks run together."""
    for number in range(max(len(each) for each in PROMPTS)):
        prompt, answer = [1], [1]
        if number < len(prompts):
            prompt, answer = prompts[number], answers.tokens[number]
        expected = read_again(model, prompt, answer)
        if number >= len(prompts):
            continue
        assert 1 <= len(answer) <= NEW
        assert not STOP & set(answer[:-1])
        assert len(answer) == NEW or answer[-1] in STOP
        picked = expected.gather(1, torch.tensor(answer).unsqueeze(1)).squeeze(1)
        rounding = 1e-6 * float(expected.abs().max())
        assert answers.logprobs[number] == pytest.approx(picked.tolist(), abs=rounding)


@pytest.mark.parametrize("llep", [None, EAGER], ids=["plain", "llep"])
def test_ragged_prompts_in_unequal_number(llep):
    run = replace(RUN, layout=Layout(ep=2, dp=2))

    def work(rank, size):
        with use_layout(run.layout):
            model = build(run, llep).train()
            for prompts in (PROMPTS[rank], PROMPTS[2 - rank]):
                settings = {"max_new_tokens": NEW, "stop_ids": STOP}
                generator = torch.Generator().manual_seed(rank)
                sampled = generate(model, prompts, generator=generator, **settings)
                greedy = generate([model], prompts, greedy=True, **settings)
                assert_right(model, prompts, sampled, rank, size)
                assert_right(model, prompts, greedy, rank, size)
                assert generate(model, prompts, greedy=True, **settings) == greedy
                assert len(greedy.tokens) == len(prompts)
                if len(prompts) > 1:
                    assert sampled.tokens != greedy.tokens
            assert all(module.training for module in model.modules())
            assert generate(model, [], **settings).tokens == []

    run_ranks(work, 2)


def test_tensor_parallel_ranks_agree():
    run = replace(RUN, layout=Layout(tp=2, ep=2, etp=1))
    prompts = PROMPTS[0]
    uniforms = torch.rand(len(prompts), NEW, generator=torch.Generator().manual_seed(1))

    def work(rank, size):
        with use_layout(run.layout):
            model = build(run, EAGER)
            answers = generate(model, prompts, max_new_tokens=NEW, stop_ids=STOP, uniforms=uniforms)
            assert_right(model, prompts, answers, 0, size)
            assert model.config.sequence_parallel
            assert model.decoder.layers[0].self_attention.linear_qkv.sequence_parallel
            return answers

    def alone(rank, size):
        single = replace(RUN, layout=Layout())
        with use_layout(single.layout):
            settings = {"max_new_tokens": NEW, "stop_ids": STOP}
            return generate(build(single), prompts, uniforms=uniforms, **settings)

    first, second = run_ranks(work, 2)
    assert first == second
    (expected,) = run_ranks(alone, 1)
    assert first.tokens == expected.tokens


@needs_megatron((0, 19), "latent attention without Transformer Engine")
def test_latent_attention():
    """Keys and values have widths of their own, and queries go on from cached positions."""

    def work(rank, size):
        with use_layout(RUN.layout):
            for config in (LATENT, LATENT | {"q_lora_rank": None, "rope_type": "rope"}):
                model = build(replace(RUN, config=config), EAGER)
                settings = {"max_new_tokens": NEW, "stop_ids": STOP}
                answers = generate(model, PROMPTS[rank], greedy=True, **settings)
                assert_right(model, PROMPTS[rank], answers, rank, size)

    run_ranks(work, 2)


def test_an_answer_depends_on_its_own_draws_alone():
    """Not on which rank has it, nor on what else that rank has."""
    prompts = PROMPTS[0]
    uniforms = torch.rand(len(prompts), NEW, generator=torch.Generator().manual_seed(1))

    def work(rank, size):
        settings = {"max_new_tokens": NEW, "stop_ids": STOP}
        with use_layout(RUN.layout):
            model = build(RUN)
            mine = slice(0, len(prompts)) if rank == 0 else slice(0, 0)
            whole = generate(model, prompts[mine], uniforms=uniforms[mine], **settings)
            mine = slice(rank, None, 2)
            part = generate(model, prompts[mine], uniforms=uniforms[mine], **settings)
            return whole.tokens, part.tokens

    (whole, even), (_, odd) = run_ranks(work, 2)
    assert [even[0], odd[0], even[1], odd[1]] == whole
    assert len({tuple(answer) for answer in whole}) > 1


def test_ids_that_pad_the_vocabulary_are_never_taken():
    def work(rank, size):
        with use_layout(RUN.layout):
            settings = {"max_new_tokens": NEW, "stop_ids": (), "vocab_size": 7}
            for greedy in (True, False):
                answers = generate(build(RUN), PROMPTS[0], greedy=greedy, **settings)
                assert all(max(answer) < 7 and len(answer) == NEW for answer in answers.tokens)
                assert len({id for answer in answers.tokens for id in answer}) > 1

    run_ranks(work, 2)


def test_lends_while_reading_prompts_and_not_after_that():
    def work(rank, size):
        decisions = []
        with use_layout(RUN.layout):
            model = build(RUN, EAGER)
            force_routing([model], Routing("hot"))
            note_decisions([model], decisions)
            answers = generate(model, [[1, 2, 3, 4]] * 4, max_new_tokens=3, stop_ids=())
            assert all(len(answer) == 3 for answer in answers.tokens)
            lent = [len(decision.plan.transfers) for decision in decisions]
            assert len(lent) == 3 * 2  # layers
            assert all(lent[:2])
            assert not any(lent[2:])
            generate(model, [[1, 2, 3, 4]] * 4, max_new_tokens=1, stop_ids=())
            assert not decisions[-1].plan.is_fallback

    run_ranks(work, 2)


def test_recorded_routing_is_that_of_whole_forwards():
    run = replace(RUN, config={"moe_enable_routing_replay": True})

    def work(rank, size):
        from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction

        with use_layout(run.layout):
            model = build(run, EAGER)
            settings = {"max_new_tokens": NEW, "stop_ids": STOP, "record_routing": True}
            answers = generate(model, PROMPTS[rank], **settings)
            for number, prompt in enumerate(PROMPTS[0]):
                answer = [1]
                if number < len(PROMPTS[rank]):
                    prompt, answer = PROMPTS[rank][number], answers.tokens[number]
                RouterReplay.set_global_router_replay_action(RouterReplayAction.RECORD)
                read_again(model, prompt, answer)
                expected = torch.stack(RouterReplay.get_recorded_data(), dim=1)
                RouterReplay.clear_global_router_replay_action()
                if number < len(PROMPTS[rank]):
                    actual = answers.routing[number, : len(prompt) + len(answer) - 1]
                    assert torch.equal(actual.long().sort()[0], expected.sort()[0])

    run_ranks(work, 2)


def test_refusals():
    def work(rank, size):
        with use_layout(Layout()):
            with pytest.raises(ValueError, match="prompt 1 has no tokens"):
                generate(torch.nn.Identity(), [[1], []], max_new_tokens=1, stop_ids=())
            with pytest.raises(ValueError, match="max_new_tokens=0"):
                generate(torch.nn.Identity(), [[1]], max_new_tokens=0, stop_ids=())

    def in_stages(rank, size):
        with use_layout(Layout(pp=2)):
            generate(torch.nn.Identity(), [[1]], max_new_tokens=1, stop_ids=())

    run_ranks(work, 1)
    with pytest.raises(RankError, match="--pipeline-model-parallel-size 2"):
        run_ranks(in_stages, 2)
