"""What a reinforcement-learning task is: prompts, and a rule that rewards an answer.

A task is a function without arguments that returns a `Task`; `--rl-task` names it as
MODULE:FUNCTION or FILE.py:FUNCTION. See `arithmetic.py` for one.
"""

import importlib
import importlib.util
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

_SHIPPED = "megatron_llep.training.rl.arithmetic:one_digit_sums"


@dataclass(frozen=True)
class Prompt:
    """One question."""

    content: str | Sequence[Mapping[str, Any]]
    """What the user says, or messages with `role` and `content` that the assistant is to answer."""
    answer: str | None = None
    """The right answer, where there is one: evaluation then reports how many match exactly."""
    info: Any = None
    """Whatever else the reward needs."""

    @property
    def messages(self) -> list[Mapping[str, Any]]:
        """The conversation so far."""
        if isinstance(self.content, str):
            return [{"role": "user", "content": self.content}]
        return list(self.content)


Reward = Callable[[Prompt, str], float]
"""From a prompt and the text of an answer: any finite number. It must not draw at random."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """Prompts and a reward. Every rank makes the task by itself: all must get the same."""

    train: Sequence[Prompt]
    reward: Reward
    held_out: Sequence[Prompt] = ()
    """For evaluation."""


def load_task(name: str | None) -> Task:
    """Make the task that `--rl-task` names, and try its reward.

    Raises:
        ValueError: it cannot be found, has no prompts, or its reward is not a finite number; names
            the flag, its value and the way out.
    """
    if not name:
        raise ValueError(
            "--rl-task is missing: give MODULE:FUNCTION or FILE.py:FUNCTION; the function returns "
            f"a megatron_llep.training.rl.task.Task, as {_SHIPPED} does"
        )
    task = _find_function(name)()
    if not isinstance(task, Task):
        raise ValueError(
            f"--rl-task {name}: it returned {type(task).__name__}; return a "
            "megatron_llep.training.rl.task.Task"
        )
    if len(task.train) == 0:
        raise ValueError(f"--rl-task {name}: it has no prompts to train on; give some as `train`")
    for prompt in (task.train[0], *task.held_out[:1]):
        if not isinstance(prompt, Prompt):
            raise ValueError(
                f"--rl-task {name}: a prompt is {type(prompt).__name__}; give "
                "megatron_llep.training.rl.task.Prompt(text or messages)"
            )
        for answer in ("", prompt.answer or "?"):
            get_reward(task, prompt, answer, name=name)
    return task


def get_reward(task: Task, prompt: Prompt, answer: str, *, name: str) -> float:
    """The reward of one answer.

    Args:
        task: whose reward to ask.
        prompt: the question.
        answer: its text.
        name: of the task, for messages.

    Raises:
        ValueError: it is not a finite number.
    """
    reward = task.reward(prompt, answer)
    try:
        value = float(reward)
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(
            f"--rl-task {name}: the reward of answer {answer!r} to {prompt.content!r} is "
            f"{reward!r}; return a finite number"
        )
    return value


def _find_function(name: str) -> Callable[[], Any]:
    place, _, function_name = name.rpartition(":")
    if not place or not function_name:
        raise ValueError(
            f"--rl-task {name}: give MODULE:FUNCTION or FILE.py:FUNCTION, for example {_SHIPPED}"
        )
    module = _load_file(place, name) if place.endswith(".py") else _load_module(place, name)
    function = getattr(module, function_name, None)
    if not callable(function):
        names = [key for key, value in vars(module).items() if callable(value) and key[0] != "_"]
        raise ValueError(
            f"--rl-task {name}: {place} has no function {function_name!r}; it has "
            f"{', '.join(names) or 'none'}"
        )
    return function


def _load_module(place: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{place}.".startswith(f"{error.name}."):
            raise  # the module is there, and misses another one
        raise ValueError(
            f"--rl-task {name}: there is no module {error.name!r} on Python's path; give a file, "
            "as FILE.py:FUNCTION, or put its folder on PYTHONPATH"
        ) from error


def _load_file(place: str, name: str) -> ModuleType:
    path = Path(place).expanduser().resolve()
    if not path.is_file():
        raise ValueError(
            f"--rl-task {name}: there is no file {path}; paths count from {os.getcwd()}"
        )
    spec = importlib.util.spec_from_file_location(f"_rl_task_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None, "a .py file has a loader"
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up; under a name that no other module has.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
