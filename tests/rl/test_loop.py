"""What Megatron's loop gets: micro-batches of rollouts, step after step, and their logprobs.

Letters: n prompts, G answers a prompt.
"""

from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch

from megatron_llep.training.rl.loop import Loop
from megatron_llep.training.rl.rollout import Answers, Question
from megatron_llep.training.rl.step import get_negative_logprobs
from megatron_llep.training.rl.task import Prompt
from support.layout import Layout, use_layout
from support.ranks import run_ranks
from support.training import Run, build_model, make_config

N, G = 2, 4
ARGS = {
    "grpo_prompts_per_step": N,
    "grpo_group_size": G,
    "grpo_iterations": 2,
    "grpo_kl_beta": 0.0,
    "global_batch_size": 4,
    "micro_batch_size": 2,
    "tensor_model_parallel_size": 1,
    "sequence_parallel": False,
    "num_experts": 8,
    "rl_routing_replay": "none",
    "overlap_param_gather": False,
    "pretrained_checkpoint": None,
    "do_valid": False,
}


class FakePlayer:
    """Answers with the number of the rollout and of the answer."""

    chat = SimpleNamespace(pad_id=0, end_ids=frozenset((9,)))

    def __init__(self):
        self.played = []

    def roll_out(self, model, number: int) -> Answers:
        self.played.append(number)
        tokens = [[number, place + 20, 9] for place in range(N * G)]
        return Answers(
            questions=[Question(prompt=Prompt("?"), ids=[1, 2])] * (N * G),
            tokens=tokens,
            logprobs=[[0.0] * 3] * (N * G),
            routing=None,
            texts=["?"] * (N * G),
            rewards=[1.0, 0.0, 0.0, 1.0, 0.5, 0.5, 0.5, 0.5],
            imbalance={},
            seconds=0.0,
        )


def run_alone(work) -> None:
    def with_model(rank, size):
        run = Run(layout=Layout())
        with use_layout(run.layout), torch.no_grad():
            (model,) = build_model(make_config(run), run)
            work(model)

    run_ranks(with_model, 1)


def change_state(model, change):
    """Megatron's states have None in the place of some extra state."""
    state = model.state_dict()
    return {name: None if weight is None else change(weight) for name, weight in state.items()}


def test_steps_go_over_a_rollout_as_often_as_asked():
    def work(model):
        player = FakePlayer()
        loop = Loop(Namespace(**ARGS), player, None)

        def get_answers(iteration: int) -> list[list[int]]:
            batches = loop.get_grpo_data_iterator([model], None, None, iteration, {})
            return [batch.labels[:, -2].tolist() for batch in (next(batches), next(batches))]

        first, second = [[20, 21], [22, 23]], [[24, 25], [26, 27]]
        assert [get_answers(step) for step in range(4)] == [first, second, first, second]
        assert player.played == [0]
        assert get_answers(4) == first
        assert player.played == [0, 1]
        # A run that goes on in the middle of a rollout.
        resumed = FakePlayer()
        loop = Loop(Namespace(**ARGS), resumed, None)
        assert get_answers(7) == second
        assert resumed.played == [1]
        batch = next(loop.get_grpo_data_iterator([model], None, None, 6, {}))
        half = 0.5 / 0.5001
        assert batch.advantages.tolist() == pytest.approx([half, -half])
        assert torch.equal(batch.old_logprobs, -get_negative_logprobs(model, batch))
        assert batch.reference_logprobs is None

    run_alone(work)


@pytest.mark.parametrize("source", ["Megatron's checkpoint", "a loader"])
def test_the_reference_is_in_the_model_for_its_logprobs_alone(source):
    def work(model):
        mine = change_state(model, torch.clone)
        other = change_state(model, lambda weight: 1.5 * weight)
        loaded = []

        def load(chunks):
            loaded.append(chunks)
            chunks[0].load_state_dict(other)

        args = ARGS | {"grpo_kl_beta": 0.1}
        if source == "Megatron's checkpoint":
            args["pretrained_checkpoint"] = "somewhere"
        megatrons = other if source == "Megatron's checkpoint" else mine
        loop = Loop(Namespace(**args), FakePlayer(), load)
        for iteration in (0, 4):
            batch = next(loop.get_grpo_data_iterator([model], None, None, iteration, megatrons))
            for name, weight in model.state_dict().items():
                assert weight is None or torch.equal(weight, mine[name])
            assert torch.equal(batch.old_logprobs, -get_negative_logprobs(model, batch))
            model.load_state_dict(other)
            expected = -get_negative_logprobs(model, batch)
            model.load_state_dict(mine)
            assert torch.equal(batch.reference_logprobs, expected)
            assert not torch.allclose(expected, batch.old_logprobs)
        assert len(loaded) == (source == "a loader")

    run_alone(work)
