"""Which prompts a rollout has, what the model answers, and how that is rewarded.

Everything that is drawn at random follows from the seed and the number of the rollout, and each
answer's draws from the number of its prompt in it: a resumed run goes on as if it had not stopped,
and the number of ranks changes nothing.
"""

import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.training import get_tokenizer

from megatron_llep.integration.watch_loads import watch_loads
from megatron_llep.training.chat import Chat, build_chat
from megatron_llep.training.generation import Generations, generate
from megatron_llep.training.rl.replay import stop_replay
from megatron_llep.training.rl.task import Prompt, Task, get_reward

# What a generator is seeded with besides the run's seed and numbers.
_ORDER, _ANSWERS = 1, 2


@dataclass(frozen=True, kw_only=True)
class Question:
    """A prompt and its tokens."""

    prompt: Prompt
    ids: list[int]


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What this rank's model answered to its questions, group after group."""

    questions: list[Question]
    """One for each answer."""
    tokens: list[list[int]]
    logprobs: list[list[float]]
    routing: list[torch.Tensor] | None
    """Of each, int16 [tokens read, L, K]."""
    texts: list[str]
    rewards: list[float]
    imbalance: dict[str, float]
    """Of expert-parallel ranks, by what is logged."""
    seconds: float

    @property
    def exact_matches(self) -> list[bool]:
        """Of the answers to prompts that have a right one."""
        pairs = zip(self.questions, self.texts, strict=True)
        return [
            text.strip() == question.prompt.answer.strip()
            for question, text in pairs
            if question.prompt.answer is not None
        ]


class Player:
    """Plays a task with the model."""

    def __init__(self, args: Namespace, task: Task):
        """Write the task's prompts as tokens; needs Megatron's tokenizer, and no process group.

        Raises:
            ValueError: a prompt is too long, or cannot be written.
        """
        self._args = args
        self._task = task
        tokenizer = get_tokenizer()
        self.chat: Chat = build_chat(args, tokenizer)
        self._vocab_size = tokenizer.vocab_size
        self._train = [self._ask(prompt) for prompt in task.train]
        self._order: tuple[int, np.ndarray] | None = None  # of one epoch
        self._held_out = [self._ask(prompt) for prompt in task.held_out[: args.rl_prompts_per_eval]]

    @property
    def evaluates(self) -> bool:
        """Whether there is anything to evaluate on."""
        return len(self._held_out) > 0

    def roll_out(self, model: torch.nn.Module, number: int) -> Answers:
        """Sample answers to this rank's share of rollout `number`'s prompts; all ranks call it.

        Returns:
            `--grpo-group-size` answers to each of its prompts, one after another.
        """
        args = self._args
        ranks = parallel_state.get_data_parallel_world_size()
        # In turn: a global batch of whole groups has the same prompts for any number of ranks.
        places = range(parallel_state.get_data_parallel_rank(), args.grpo_prompts_per_step, ranks)
        start = number * args.grpo_prompts_per_step
        questions = []
        for place in places:
            questions += [self._choose(start + place)] * args.grpo_group_size
        draws = [
            np.random.default_rng((_ANSWERS, args.seed, number, place)).random(
                (args.grpo_group_size, args.rl_max_new_tokens)
            )
            for place in places
        ]
        uniforms = torch.from_numpy(np.concatenate(draws))
        return self._play(model, questions, uniforms)

    def evaluate(self, model: torch.nn.Module) -> Answers:
        """Answer this rank's share of the held-out prompts greedily; all ranks call it."""
        ranks = parallel_state.get_data_parallel_world_size()
        mine = self._held_out[parallel_state.get_data_parallel_rank() :: ranks]
        return self._play(model, mine, None)

    def _ask(self, prompt: Prompt) -> Question:
        args = self._args
        try:
            ids = self.chat.prompt(prompt.messages)
        except ValueError as error:
            raise ValueError(
                f"--rl-task {args.rl_task}: prompt {prompt.content!r}: {error}"
            ) from error
        if len(ids) + args.rl_max_new_tokens > args.seq_length:
            raise ValueError(
                f"--rl-max-new-tokens {args.rl_max_new_tokens}: prompt {prompt.content!r} of "
                f"--rl-task {args.rl_task} has {len(ids)} tokens, together more than --seq-length "
                f"{args.seq_length}; allow fewer new tokens, or longer sequences"
            )
        return Question(prompt=prompt, ids=ids)

    def _choose(self, position: int) -> Question:
        """The question at a position of the endless, shuffled sequence of all of them."""
        epoch, place = divmod(position, len(self._train))
        if self._order is None or self._order[0] != epoch:
            random = np.random.default_rng((_ORDER, self._args.seed, epoch))
            self._order = epoch, random.permutation(len(self._train))
        return self._train[self._order[1][place]]

    def _play(
        self, model: torch.nn.Module, questions: list[Question], uniforms: torch.Tensor | None
    ) -> Answers:
        """Answer greedily where there are no draws [answers, tokens]."""
        stop_replay()  # of the training step before
        start = time.perf_counter()
        tokens: list[list[int]] = []
        logprobs: list[list[float]] = []
        routing: list[torch.Tensor] = []
        parts = []
        for mine in self._cut(len(questions)):
            asked = questions[mine]
            with watch_loads(model) as loads:
                part = generate(
                    model,
                    [question.ids for question in asked],
                    max_new_tokens=self._args.rl_max_new_tokens,
                    stop_ids=self.chat.end_ids,
                    greedy=uniforms is None,
                    uniforms=None if uniforms is None else uniforms[mine],
                    vocab_size=self._vocab_size,
                    record_routing=self._args.rl_routing_replay == "R3" and uniforms is not None,
                )
            parts.append(loads.gather())
            tokens += part.tokens
            logprobs += part.logprobs
            routing += _cut_routing(asked, part)
        imbalance = {}
        for phase, forwards in (("prefill", slice(0, 1)), ("decode", slice(1, None))):
            pairs = [part.of(forwards).worst_layer for part in parts]
            for index, when in enumerate(("before", "after")):
                mean = sum(pair[index] for pair in pairs) / len(pairs)
                imbalance[f"{phase}_imbalance_{when}"] = mean
        texts = [self.chat.decode(answer) for answer in tokens]
        return Answers(
            questions=questions,
            tokens=tokens,
            logprobs=logprobs,
            routing=routing or None,
            texts=texts,
            rewards=self._reward(questions, texts),
            imbalance=imbalance,
            seconds=time.perf_counter() - start,
        )

    def _cut(self, number: int) -> list[slice]:
        """As many parts on every rank, at least one."""
        size = self._args.rl_answers_at_a_time
        if size is None:
            return [slice(0, number)]
        most = torch.tensor([number], device=torch.cuda.current_device())
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        return [slice(start, start + size) for start in range(0, max(int(most), 1), size)]

    def _reward(self, questions: Sequence[Question], texts: Sequence[str]) -> list[float]:
        """The rewards; an error on one rank ends all of them, and none waits for it."""
        rewards, error = [], None
        try:
            for question, text in zip(questions, texts, strict=True):
                rewards.append(
                    get_reward(self._task, question.prompt, text, name=self._args.rl_task)
                )
        except Exception as raised:  # whatever a user's reward raises
            error = raised
        failed = torch.tensor([error is not None], dtype=torch.int32)
        failed = failed.to(torch.cuda.current_device())
        dist.all_reduce(failed, op=dist.ReduceOp.MAX)
        if error is not None:
            raise error
        if failed.item():
            raise ValueError(
                f"--rl-task {self._args.rl_task}: the reward failed on another rank, which says why"
            )
        return rewards


def _cut_routing(questions: Sequence[Question], part: Generations) -> list[torch.Tensor]:
    """Of each answer, that of the tokens the model has read for it."""
    if part.routing is None:
        return []
    pairs = zip(questions, part.tokens, strict=True)
    lengths = [len(question.ids) + len(answer) - 1 for question, answer in pairs]
    return [routing[:length] for routing, length in zip(part.routing, lengths, strict=True)]
