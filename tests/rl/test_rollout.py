"""Rollouts: whose turn a prompt is, and that the ranks together do what one does alone."""

from argparse import Namespace
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from megatron_llep.integration.convert import convert_model
from megatron_llep.training.rl import rollout
from megatron_llep.training.rl.rollout import Player
from megatron_llep.training.rl.task import Prompt, Task
from support.layout import Layout, use_layout
from support.llep import EAGER
from support.ranks import RankError, run_ranks
from support.training import VOCABULARY, Run, build_model, make_config

ARGS = {
    "grpo_prompts_per_step": 4,
    "grpo_group_size": 3,
    "rl_max_new_tokens": 5,
    "rl_prompts_per_eval": 3,
    "rl_answers_at_a_time": None,
    "rl_routing_replay": "none",
    "rl_task": "mine",
    "seq_length": 12,
    "seed": 7,
}
PROMPTS = [Prompt("x" * length, answer="a") for length in (1, 4, 2, 7, 3, 5)]


class Letters:
    """One id a letter."""

    end_ids = frozenset((VOCABULARY - 1,))
    pad_id = 0

    def prompt(self, messages):
        return [1 + number for number, _ in enumerate(messages[0]["content"])]

    def decode(self, ids):
        return "".join(chr(97 + id % 26) for id in ids)


def count_as(prompt: Prompt, answer: str) -> float:
    return float(answer.count("a"))


@pytest.fixture(autouse=True)
def letters(monkeypatch):
    monkeypatch.setattr(rollout, "get_tokenizer", lambda: SimpleNamespace(vocab_size=VOCABULARY))
    monkeypatch.setattr(rollout, "build_chat", lambda args, tokenizer: Letters())


def make_player(reward=count_as, prompts=PROMPTS, **changed) -> Player:
    task = Task(train=prompts, held_out=prompts, reward=reward)
    return Player(Namespace(**ARGS | changed), task)


def play(layout: Layout, ask, llep=None) -> list:
    """What `ask(player-and-model)` returns on each rank."""

    def work(rank, size):
        run = Run(layout=layout, config={"moe_enable_routing_replay": True})
        with use_layout(layout):
            (model,) = build_model(make_config(run), run)
            if llep is not None:
                convert_model([model], llep)
            return ask(model)

    return run_ranks(work, layout.world_size)


def test_every_prompt_has_its_turn_once_an_epoch():
    def ask(model):
        player = make_player()
        rollouts = [player.roll_out(model, number) for number in range(6)]
        again = make_player().roll_out(model, 4)
        assert again.tokens == rollouts[4].tokens
        return [[question.prompt.content for question in answers.questions] for answers in rollouts]

    (asked,) = play(Layout(), ask)
    groups = [group for each in asked for group in (each[0:3], each[3:6], each[6:9], each[9:12])]
    assert all(len(set(group)) == 1 for group in groups)
    order = [group[0] for group in groups]
    epochs = [order[start : start + 6] for start in range(0, 24, 6)]
    assert all(Counter(epoch) == Counter(prompt.content for prompt in PROMPTS) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


@pytest.mark.parametrize("changed", [{}, {"rl_answers_at_a_time": 4}], ids=["", "in parts"])
def test_ranks_together_answer_what_one_answers_alone(changed):
    def ask(model):
        player = make_player(rl_routing_replay="R3", **changed)
        sampled, greedy = player.roll_out(model, 2), player.evaluate(model)
        for question, answer, routing in zip(
            sampled.questions, sampled.tokens, sampled.routing, strict=True
        ):
            assert routing.shape == (len(question.ids) + len(answer) - 1, 2, 2)
        assert greedy.routing is None
        return sampled.tokens, sampled.rewards, greedy.tokens, greedy.exact_matches

    ((sampled, rewards, greedy, matches),) = play(Layout(), ask)
    first, second = play(Layout(ep=2), ask, EAGER)
    # Prompts, with their groups, are dealt in turn.
    for number, expected in enumerate((sampled, rewards)):
        mine, others = first[number], second[number]
        assert mine[:3] + others[:3] + mine[3:] + others[3:] == expected
    assert [first[2][0], second[2][0], first[2][1]] == greedy
    assert len(matches) == 3
    assert len({tuple(answer) for answer in sampled}) > 6
    assert len(set(rewards)) > 1


def test_the_same_prompt_is_answered_anew_each_time():
    def ask(model):
        player = make_player(prompts=PROMPTS[:1])
        return [player.roll_out(model, number).tokens for number in range(2)]

    ((first, second),) = play(Layout(), ask)
    assert len({tuple(answer) for answer in first + second}) > 20  # of 24


def test_an_error_on_one_rank_ends_all():
    def fail_once(prompt, answer):
        return float("nan") if torch.distributed.get_rank() == 1 else 0.0

    def ask(model):
        with pytest.raises(ValueError, match="--rl-task mine: the reward") as error:
            make_player(fail_once).roll_out(model, 0)
        return str(error.value)

    first, second = play(Layout(ep=2), ask)
    assert "failed on another rank" in first
    assert "return a finite number" in second
    with pytest.raises(RankError, match="ZeroDivisionError"):
        play(Layout(), lambda model: make_player(lambda p, a: 1 / 0).evaluate(model))


def test_a_prompt_that_does_not_fit_is_refused_at_once():
    with pytest.raises(ValueError, match="--rl-max-new-tokens 6: prompt 'xxxxxxx' of --rl-task"):
        make_player(rl_max_new_tokens=6)
