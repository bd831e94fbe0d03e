"""The real RL script: a task of one's own, plain EP and LLEP, resume, layouts.

Runs are shared, as each takes a while; one is started as a user does. All start from the weights of
one short run, to which the KL is held.
"""

from pathlib import Path
from typing import Any

import pytest
from script_runs import ROOT, Log, run_tiny
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

CONFIG = ROOT / "configs" / "rl-demo.yaml"
SCRIPT = ROOT / "finetune" / "train_rl.py"

# Two updates a rollout on two epochs of it: a rollout lasts four steps.
STEPS, HALF = 24, 12
ROLLOUTS = [1, 5, 9, 13, 17, 21]
BATCH = ["--grpo-prompts-per-step", 8, "--grpo-group-size", 8, "--micro-batch-size", 8]
BATCH += ["--global-batch-size", 32, "--grpo-iterations", 2]

# Quick to learn from nothing: the reward of random bytes is about a fifth.
TASK = """
from megatron_llep.training.rl.task import Prompt, Task

def make():
    prompts = [Prompt(letter * length) for letter in "abcd" for length in (1, 2, 5)]
    return Task(train=prompts[2:], held_out=prompts[:5], reward=reward_small_bytes)

def reward_small_bytes(prompt, answer):
    return sum(ord(letter) < 48 for letter in answer) / 6
"""

pytestmark = pytest.mark.timeout(600)  # a fixture may start the script twice

Scalars = dict[str, dict[int, float]]
"""Name -> step -> value."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("runs")
    (path / "task.py").write_text(TASK)
    return path


@pytest.fixture(scope="module")
def train(folder):
    def train(name: str, *flags: object, llep: bool = True, **options: Any) -> Log:
        task = ["--rl-task", f"{folder / 'task.py'}:make", "--rl-max-new-tokens", 6]
        # Padding of the vocabulary takes part in the loss: 384 rows with TP 1 and 2 alike.
        task += ["--make-vocab-size-divisible-by", 192, "--lr", 1e-2, "--min-lr", 1e-2]
        task += ["--moe-llep-planner", "exact"] if llep else []
        logs = ["--tensorboard-dir", folder / f"{name}-tensorboard", "--ckpt-format", "torch_dist"]
        common = [*BATCH, *task, *logs, "--train-iters", STEPS, "--eval-interval", 10]
        return run_tiny(
            [*common, *flags],
            llep=llep,
            config=CONFIG,
            script=SCRIPT,
            **options,
        )

    return train


@pytest.fixture(scope="module")
def start(train, folder) -> Path:
    """A checkpoint to start from."""
    train("start", "--train-iters", 4, "--save", folder / "start", "--save-interval", 4)
    return folder / "start"


@pytest.fixture(scope="module")
def with_kl(start):
    """Flags of the runs that are compared."""
    kl = ["--pretrained-checkpoint", start, "--grpo-kl-beta", 0.05]
    return [*kl, "--rl-routing-replay", "R2"]


@pytest.fixture(scope="module")
def lending(train, with_kl, folder) -> Log:
    saving = ["--save", folder / "lending", "--save-interval", HALF]
    return train("lending", *with_kl, *saving, as_user=True)


@pytest.fixture(scope="module")
def scalars(folder):
    """What a run has written for TensorBoard."""

    def read(name: str) -> Scalars:
        events = EventAccumulator(str(folder / f"{name}-tensorboard")).Reload()
        return {
            tag: {event.step: event.value for event in events.Scalars(tag)}
            for tag in events.Tags()["scalars"]
        }

    return read


def test_reward_rises(lending, scalars):
    logged = scalars("lending")
    rewards = logged["rl/mean_reward"]
    assert list(rewards) == ROLLOUTS
    assert rewards[ROLLOUTS[-1]] > rewards[1] + 0.1
    assert list(logged["rl/eval_reward"]) == [0, 10, 20, 24]  # in mid-rollout, and at the end
    assert "rl/eval_exact_match" not in logged  # no prompt has a right answer
    for step in logged["rl/eval_reward"]:
        assert lending.text.count(f"evaluation at iteration {step} |") == 1
    assert lending.read("mean reward")[9] == pytest.approx(rewards[9], abs=1e-4)
    assert lending.text.count("Megatron's loop runs GRPO: added --perform-rl-step") == 1


def test_the_kl_is_to_the_weights_of_the_start(lending, scalars):
    kl = scalars("lending")["rl/kl_term"]
    assert kl[1] == 0
    assert kl[2] > 0
    assert kl[STEPS] > kl[2]


def test_what_is_logged_of_the_ranks_loads(lending, scalars):
    logged = scalars("lending")
    for phase in ("prefill", "logprobs"):
        before = logged[f"rl/{phase}_imbalance_before"]
        after = logged[f"rl/{phase}_imbalance_after"]
        assert list(before) == ROLLOUTS
        assert max(before.values()) > 1.2
        assert max(after.values()) < 1.02
    decode = logged["rl/decode_imbalance_before"]
    assert max(decode.values()) > 1.2
    assert logged["rl/decode_imbalance_after"] == decode  # nothing is lent
    assert max(logged["moe/llep/overload_factor_before"].values()) > 1.2
    assert max(logged["moe/llep/overload_factor_after"].values()) < 1.02
    # What generation computes over its cache is what training computes.
    assert all(value < 1e-5 for value in logged["rl/logprob_difference"].values())


def test_rewards_are_those_of_plain_expert_parallelism(train, with_kl, lending, scalars):
    train("plain", *with_kl, llep=False)
    expected, actual = scalars("plain"), scalars("lending")
    for name in ("rl/mean_reward", "rl/eval_reward", "rl/mean_length"):
        assert actual[name] == expected[name]
    for name in ("rl/prefill_imbalance_before", "rl/decode_imbalance_before"):
        assert actual[name] == expected[name]
    assert expected["rl/prefill_imbalance_after"] == expected["rl/prefill_imbalance_before"]
    assert actual["grad-norm"] == pytest.approx(expected["grad-norm"], rel=1e-3)


def test_a_resumed_run_is_a_straight_one(train, with_kl, lending, scalars, folder):
    # As if the run had been stopped after that step.
    (folder / "lending" / "latest_checkpointed_iteration.txt").write_text(str(HALF))
    train("resumed", *with_kl, "--load", folder / "lending")
    expected, actual = scalars("lending"), scalars("resumed")
    assert list(actual["lm loss"]) == list(range(HALF + 1, STEPS + 1))
    for name in ("rl/mean_reward", "rl/eval_reward", "rl/kl_term", "lm loss", "grad-norm"):
        rest = {step: value for step, value in expected[name].items() if step > HALF}
        assert actual[name] == pytest.approx(rest, rel=1e-6), name


LAYOUTS = {
    "tp": {"tensor-model-parallel-size": 2, "sequence-parallel": True},
    "ep4": {"expert-model-parallel-size": 4},
}


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_answer_alike(layout, train, with_kl, lending, scalars):
    train(layout, *with_kl, "--train-iters", 4, layout=LAYOUTS[layout])
    expected, actual = scalars("lending"), scalars(layout)
    assert actual["rl/mean_reward"][1] == expected["rl/mean_reward"][1]
    assert actual["rl/eval_reward"][0] == expected["rl/eval_reward"][0]
    for name in ("grad-norm", "rl/truncated_from_above"):
        for step in (1, 2, 3, 4):
            assert actual[name][step] == pytest.approx(expected[name][step], rel=1e-3), name


OPTIONS = {
    "bf16": ["--bf16"],
    "R3": ["--rl-routing-replay", "R3"],
    "tokens weigh the same": ["--calculate-per-token-loss"],
    "parts": ["--rl-generation-batch-size", 5],
    "recompute": [
        *("--recompute-granularity", "full", "--recompute-method", "uniform"),
        *("--recompute-num-layers", 1),
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONS)
def test_options(name, train, with_kl, lending, scalars):
    train(name, *with_kl, *OPTIONS[name], "--train-iters", 8)
    expected, actual = scalars("lending"), scalars(name)
    assert list(actual["rl/mean_reward"]) == [1, 5]
    if name == "bf16":
        assert actual["rl/mean_reward"][1] == pytest.approx(expected["rl/mean_reward"][1], abs=0.05)
    else:
        assert actual["rl/mean_reward"][1] == expected["rl/mean_reward"][1]
    if name in ("parts", "recompute"):
        assert actual["grad-norm"][8] == pytest.approx(expected["grad-norm"][8], rel=1e-3)


@pytest.mark.slow
def test_overlap_with_the_distributed_optimizer_changes_nothing(train, with_kl, scalars):
    """Its weights are still on their way when a rollout begins."""
    flags = [*with_kl, "--train-iters", 8, "--use-distributed-optimizer"]
    train("apart", *flags)
    train("overlap", *flags, "--overlap-grad-reduce", "--overlap-param-gather")
    expected, actual = scalars("apart"), scalars("overlap")
    for name in ("rl/mean_reward", "rl/kl_term", "grad-norm"):
        assert actual[name] == pytest.approx(expected[name], rel=1e-6), name
