"""Sums, `3+4=`: tasks whose answers a rule checks."""

from megatron_llep.training.rl.task import Prompt, Task

_HELD_OUT = 5


def one_digit_sums() -> Task:
    """The hundred sums of two digits."""
    return _make_sums(range(10), range(10))


def two_digit_sums() -> Task:
    """The ten thousand sums of two numbers below a hundred."""
    return _make_sums(range(100), range(100))


def reward_exact_match(prompt: Prompt, answer: str) -> float:
    """1 for the right number, with nothing else but white space; otherwise 0."""
    return float(answer.strip() == prompt.answer)


def _make_sums(lefts: range, rights: range) -> Task:
    """Every fifth sum is held out: each number still occurs on both sides in training."""
    prompts = [Prompt(f"{left}+{right}=", str(left + right)) for left in lefts for right in rights]
    # 2 * left + right modulo 5 is even over rows and columns.
    is_held_out = [(2 * left + right) % _HELD_OUT == 0 for left in lefts for right in rights]
    pairs = list(zip(prompts, is_held_out, strict=True))
    return Task(
        train=[prompt for prompt, held_out in pairs if not held_out],
        held_out=[prompt for prompt, held_out in pairs if held_out],
        reward=reward_exact_match,
    )
