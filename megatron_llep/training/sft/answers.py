"""Exact-match accuracy: at each evaluation the model answers validation conversations, greedily."""

from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core import parallel_state
from megatron.core.datasets.blended_megatron_dataset_config import (
    convert_split_vector_to_split_matrix,
    parse_and_normalize_split,
)
from megatron.core.datasets.utils import Split
from megatron.training import get_args, get_tokenizer, print_rank_last
from megatron.training.utils.common_utils import get_blend_and_blend_per_split

from megatron_llep.training.chat import Chat, build_chat
from megatron_llep.training.generation import generate
from megatron_llep.training.report import average, format_values, log_scalars
from megatron_llep.training.sft.conversations import Conversation, read_conversations


@dataclass(frozen=True)
class Question:
    """The last answer of a conversation, and what leads to it."""

    ids: list[int]
    answer: str


class AnswerCheck:
    """Called by Megatron's evaluation (`non_loss_data_func`), on every rank."""

    def __init__(self) -> None:
        self._questions: list[Question] | None = None
        self._checked: int | None = None

    def __call__(self, model: Sequence[torch.nn.Module]) -> None:
        """Answer this rank's share of the questions; log the share of all that are right.

        Once an iteration: at the end Megatron evaluates on the validation and on the test set.
        """
        args = get_args()
        # Megatron's loop counts the step that it has just done from 0.
        iteration = args.curr_iteration + (not args.skip_train)
        if iteration == self._checked:
            return
        self._checked = iteration
        chat = build_chat(args, get_tokenizer())
        if self._questions is None:
            self._questions = read_questions(args, chat)
        ranks = parallel_state.get_data_parallel_world_size()
        mine = self._questions[parallel_state.get_data_parallel_rank() :: ranks]
        answers = generate(
            model,
            [question.ids for question in mine],
            max_new_tokens=args.sft_max_new_tokens,
            stop_ids=chat.end_ids,
            greedy=True,
            vocab_size=get_tokenizer().vocab_size,
        )
        texts = [chat.decode(ids) for ids in answers.tokens]
        pairs = zip(mine, texts, strict=True)
        right = [float(text.strip() == question.answer.strip()) for question, text in pairs]
        shares = average({"exact match": right})
        log_scalars(shares, iteration, prefix="")
        print_rank_last(f" answers at iteration {iteration} |{format_values(shares)}")


def read_questions(args: Namespace, chat: Chat) -> list[Question]:
    """The last turns of the first `--sft-eval-answers` validation conversations that fit.

    Raises:
        ValueError: there are none.
    """
    questions: list[Question] = []
    for conversation in _read_validation(args):
        question = _ask(conversation, chat)
        if question and len(question.ids) + args.sft_max_new_tokens <= args.seq_length:
            questions.append(question)
        if len(questions) == args.sft_eval_answers:
            break
    if not questions:
        raise ValueError(
            f"--sft-eval-answers {args.sft_eval_answers}: no validation conversation leaves room "
            f"for --sft-max-new-tokens {args.sft_max_new_tokens} in --seq-length "
            f"{args.seq_length}; allow fewer new tokens, or give --split a validation part"
        )
    return questions


def _ask(conversation: Conversation, chat: Chat) -> Question | None:
    messages = list(conversation.messages)
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    if not messages:
        return None
    ids = chat.prompt(messages[:-1], conversation.tools)
    whole = chat.encode(messages, conversation.tools)[-1].ids
    return Question(ids, chat.decode(whole[len(ids) :]))


def _read_validation(args: Namespace) -> Iterator[Conversation]:
    """As Megatron's builder divides the files."""
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    if blend_per_split is not None:
        for path in (blend_per_split[Split.valid.value] or ((),))[0]:
            yield from read_conversations(Path(path))
        return
    shares = convert_split_vector_to_split_matrix(parse_and_normalize_split(args.split))
    share = shares[Split.valid.value]
    if blend is None or share is None:
        return
    for path in blend[0]:
        conversations = list(read_conversations(Path(path)))
        first, last = (round(part * len(conversations)) for part in share)
        yield from conversations[first:last]
