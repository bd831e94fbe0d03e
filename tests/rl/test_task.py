"""Tasks: what ships, a user's own file, and what is refused."""

import pytest

from megatron_llep.training.rl.arithmetic import one_digit_sums, two_digit_sums
from megatron_llep.training.rl.task import Prompt, Task, get_reward, load_task

SHIPPED = "megatron_llep.training.rl.arithmetic:one_digit_sums"

REVERSE = """
from __future__ import annotations
from dataclasses import dataclass
from megatron_llep.training.rl.task import Prompt, Task

WORDS = ["stone", "river", "cloud"]

@dataclass
class Hint:
    first: str

def reverse_words():
    prompts = [Prompt(f"Reverse {word}", answer=word[::-1], info=Hint(word[-1])) for word in WORDS]
    return Task(train=prompts[:2], held_out=prompts[2:], reward=reward)

def reward(prompt, answer):
    return sum(a == b for a, b in zip(answer, prompt.answer)) / len(prompt.answer)
"""


@pytest.fixture
def write(tmp_path):
    def write(code: str) -> str:
        path = tmp_path / "my_task.py"
        path.write_text(code)
        return str(path)

    return write


def test_arithmetic():
    task = load_task(SHIPPED)
    assert len(task.train) == 80
    assert len(task.held_out) == 20
    asked = {prompt.content for prompt in [*task.train, *task.held_out]}
    assert asked == {f"{a}+{b}=" for a in range(10) for b in range(10)}
    for number in range(10):
        assert any(prompt.content.startswith(f"{number}+") for prompt in task.train)
        assert any(prompt.content.startswith(f"{number}+") for prompt in task.held_out)
    for prompt in task.train:
        left, right = prompt.content.strip("=").split("+")
        assert task.reward(prompt, str(int(left) + int(right))) == 1
        assert task.reward(prompt, str(int(left) + int(right) + 1)) == 0
        assert task.reward(prompt, "") == 0
    assert len(two_digit_sums().train) == 8000
    assert one_digit_sums() == task


def test_a_file_of_ones_own(write):
    task = load_task(f"{write(REVERSE)}:reverse_words")
    assert task.train[0].messages == [{"role": "user", "content": "Reverse stone"}]
    assert task.train[0].info.first == "e"
    assert get_reward(task, task.train[0], "enots", name="") == 1
    assert get_reward(task, task.train[0], "enXXX", name="") == 0.4


def test_a_prompt_may_be_messages():
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert Prompt(messages).messages == messages


BAD_NAMES = {
    None: "--rl-task is missing",
    "arithmetic": "--rl-task arithmetic: give MODULE:FUNCTION",
    ":sums": "--rl-task :sums: give MODULE:FUNCTION",
    "no_such_module:sums": "no module 'no_such_module'",
    "megatron_llep.no_such:sums": "no module 'megatron_llep.no_such'",
    "/no/such/file.py:sums": "no file /no/such/file.py",
    SHIPPED + "x": "no function 'one_digit_sumsx'; it has .*one_digit_sums",
}


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_task_that_is_not_there(name):
    with pytest.raises(ValueError, match=BAD_NAMES[name]):
        load_task(name)


BAD_TASKS = {
    "no prompts": ("Task(train=[], reward=lambda p, a: 0)", "no prompts to train on"),
    "no task": ("[]", "it returned list"),
    "no prompt": ("Task(train=['1+1='], reward=lambda p, a: 0)", "a prompt is str"),
    "no number": ("Task(train=[Prompt('a')], reward=lambda p, a: None)", "is None; return a fin"),
    "nan": ("Task(train=[Prompt('a')], reward=lambda p, a: float('nan'))", "is nan; return a f"),
    "infinite": (
        "Task(train=[Prompt('a', 'b')], reward=lambda p, a: float('inf') if a else 0)",
        "the reward of answer 'b' to 'a' is inf",
    ),
}


@pytest.mark.parametrize("name", BAD_TASKS)
def test_a_task_that_is_none(name, write):
    code, message = BAD_TASKS[name]
    head = "from megatron_llep.training.rl.task import Prompt, Task\n"
    place = write(f"{head}def make():\n    return {code}")
    with pytest.raises(ValueError, match=message) as error:
        load_task(f"{place}:make")
    assert "--rl-task" in str(error.value)


def test_a_module_that_misses_another_says_which(write):
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        load_task(f"{write('import no_such_package')}:make")


def test_the_reward_may_fail_later():
    task = Task(train=[Prompt("a")], reward=lambda prompt, answer: "many")
    with pytest.raises(ValueError, match="--rl-task mine: the reward of answer 'b' to 'a'"):
        get_reward(task, task.train[0], "b", name="mine")
