"""Conversations as token ids: by a Hugging Face tokenizer's chat template, or as bytes.

What is trained follows the prefix rule: at every turn of the assistant, the template of the turns
so far, with its generation prompt, must begin the template of the turns up to and with this one;
what comes after that beginning is what the model would have had to generate, and is trained.
"""

from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

Message = Mapping[str, Any]
"""`role` and `content`, and whatever else the chat template knows (`tool_calls`, ...)."""

_NUM_BYTES = 256
_END, _PAD = 256, 257
_BYTE_ROLES = {"system": 258, "user": 259, "assistant": 260, "tool": 261}
BYTE_VOCABULARY = 262
"""Ids 0 to 255 are bytes; then end of turn, padding, and a mark for the start of each role."""


@dataclass(frozen=True)
class Example:
    """What one training example says, and which of its tokens are answers."""

    ids: list[int]
    trained: list[bool]
    """As long as ids: whether the model learns to generate this token."""


class Chat(Protocol):
    """How text becomes tokens and back."""

    end_ids: frozenset[int]
    """A generated answer ends with one of these."""
    pad_id: int

    def encode(
        self, messages: Sequence[Message], tools: Sequence[Any] | None = None
    ) -> list[Example]:
        """Examples for training on the assistant's turns.

        One, unless the template writes a turn differently once others follow it (as those do that
        drop earlier reasoning): then one for each time it does, so that every answer is trained
        behind what the model would have seen when generating it.

        Raises:
            ValueError: what the conversation lacks, or the template cannot write.
        """
        ...

    def prompt(self, messages: Sequence[Message], tools: Sequence[Any] | None = None) -> list[int]:
        """Ids up to where the assistant's answer begins.

        Raises:
            ValueError: the template cannot write the conversation.
        """
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of generated ids, without marks of turns and padding."""
        ...


def build_chat(args: Namespace, tokenizer: Any) -> Chat:
    """The chat of a run.

    Args:
        args: Megatron's.
        tokenizer: Megatron's, as `megatron.training.get_tokenizer()` returns it.

    Raises:
        ValueError: the tokenizer is of another kind, has no chat template, or the vocabulary is too
            small for bytes; names the flag and the way out.
    """
    if args.tokenizer_type == "HuggingFaceTokenizer":
        # Megatron's wrappers: around its library class, around Hugging Face's tokenizer.
        return TemplateChat(tokenizer._tokenizer.tokenizer, name=args.tokenizer_model)
    check_chat_arguments(args)
    return ByteChat()


def check_chat_arguments(args: Namespace) -> None:
    """Check the tokenizer's flags, before any tokenizer is built.

    Raises:
        ValueError: names the flag, its value and the way out.
    """
    if args.tokenizer_type == "HuggingFaceTokenizer":
        if args.tokenizer_model is None:
            raise ValueError(
                "--tokenizer-model is missing: give the folder or name of a Hugging Face tokenizer"
            )
        return
    if args.tokenizer_type != "NullTokenizer":
        raise ValueError(
            f"--tokenizer-type {args.tokenizer_type}: conversations are written by "
            "HuggingFaceTokenizer, with the chat template of --tokenizer-model, or by "
            "NullTokenizer, as bytes; choose one of these"
        )
    if (args.vocab_size or 0) < BYTE_VOCABULARY and not args.padded_vocab_size:
        raise ValueError(
            f"--vocab-size {args.vocab_size}: conversations as bytes (--tokenizer-type "
            f"NullTokenizer) need {BYTE_VOCABULARY} ids; give --vocab-size {BYTE_VOCABULARY}"
        )


class ByteChat:
    """UTF-8 bytes between a mark for the role and one for the end of the turn."""

    end_ids = frozenset((_END,))
    pad_id = _PAD

    def encode(
        self, messages: Sequence[Message], tools: Sequence[Any] | None = None
    ) -> list[Example]:
        """As `Chat.encode`: one example."""
        ids: list[int] = []
        trained: list[bool] = []
        for message in messages:
            turn = self._encode_turn(message)
            ids += turn
            is_answer = message["role"] == "assistant"
            trained += [False] + [is_answer] * (len(turn) - 1)
        _require_answer(messages)
        return [Example(ids, trained)]

    def prompt(self, messages: Sequence[Message], tools: Sequence[Any] | None = None) -> list[int]:
        """As `Chat.prompt`."""
        turns = [self._encode_turn(message) for message in messages]
        return [id for turn in turns for id in turn] + [_BYTE_ROLES["assistant"]]

    def decode(self, ids: Sequence[int]) -> str:
        """As `Chat.decode`; what is not UTF-8 becomes U+FFFD."""
        return bytes(id for id in ids if id < _NUM_BYTES).decode(errors="replace")

    def _encode_turn(self, message: Message) -> list[int]:
        role, content = message["role"], message.get("content")
        if role not in _BYTE_ROLES:
            raise ValueError(
                f"unknown role {role!r}: as bytes there are {', '.join(_BYTE_ROLES)}; rename it, "
                "or use a --tokenizer-type HuggingFaceTokenizer whose chat template knows it"
            )
        if not isinstance(content, str):
            raise ValueError(
                f"the content of role {role!r} is {type(content).__name__}, not text: give text, "
                "or use a --tokenizer-type HuggingFaceTokenizer whose chat template takes it"
            )
        return [_BYTE_ROLES[role], *content.encode(), _END]


class TemplateChat:
    """A Hugging Face tokenizer and its chat template."""

    def __init__(self, tokenizer: Any, *, name: str):
        """Take the tokenizer.

        Args:
            tokenizer: of the library `transformers`.
            name: of the tokenizer, for messages.

        Raises:
            ValueError: it has no chat template.
        """
        self._tokenizer = tokenizer
        self._name = name
        if tokenizer.chat_template is None:
            raise ValueError(
                f"--tokenizer-model {name}: it has no chat template, so it cannot write "
                "conversations; give one with --chat-template, or take the tokenizer of the "
                "instruction-tuned model"
            )
        self.end_ids = self._find_end_ids()
        self.pad_id = next(
            id for id in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if id is not None
        )

    def encode(
        self, messages: Sequence[Message], tools: Sequence[Any] | None = None
    ) -> list[Example]:
        """As `Chat.encode`."""
        _require_answer(messages)
        examples: list[Example] = []
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._apply(messages[:number], tools, add_generation_prompt=True)
            ids = self._apply(messages[: number + 1], tools, add_generation_prompt=False)
            if ids[: len(before)] != before:
                ids = before + self._encode_answer(messages[: number + 1], tools)
            trained = [False] * len(before) + [True] * (len(ids) - len(before))
            last = examples[-1] if examples else None
            if last is not None and ids[: len(last.ids)] == last.ids:
                trained[: len(last.ids)] = last.trained
                examples.pop()
            examples.append(Example(ids, trained))
        return examples

    def prompt(self, messages: Sequence[Message], tools: Sequence[Any] | None = None) -> list[int]:
        """As `Chat.prompt`."""
        return self._apply(messages, tools, add_generation_prompt=True)

    def decode(self, ids: Sequence[int]) -> str:
        """As `Chat.decode`."""
        known = [id for id in ids if id < len(self._tokenizer)]  # the vocabulary may be padded
        return self._tokenizer.decode(known, skip_special_tokens=True)

    def _encode_answer(self, messages: Sequence[Message], tools: Sequence[Any] | None) -> list[int]:
        """The last turn's ids where prompt and answer share a token: cut as generation cuts them.

        Raises:
            ValueError: as text, too, the prompt does not begin the turn.
        """
        before = self._write(messages[:-1], tools, add_generation_prompt=True)
        text = self._write(messages, tools, add_generation_prompt=False)
        if not text.startswith(before):
            raise ValueError(
                f"the chat template of --tokenizer-model {self._name} writes turn {len(messages)} "
                "(assistant) other than it prompts for it, so what to train on is unknown; give a "
                "template whose generation prompt begins the assistant's turn with --chat-template"
            )
        return self._tokenizer(text[len(before) :], add_special_tokens=False)["input_ids"]

    def _apply(
        self, messages: Sequence[Message], tools: Sequence[Any] | None, **options: bool
    ) -> list[int]:
        return self._write(messages, tools, tokenize=True, return_dict=False, **options)

    def _write(
        self,
        messages: Sequence[Message],
        tools: Sequence[Any] | None,
        *,
        tokenize: bool = False,
        **options: bool,
    ) -> Any:
        """Apply the template: text, or ids."""
        try:
            return self._tokenizer.apply_chat_template(
                list(messages), tools=tools, tokenize=tokenize, **options
            )
        except Exception as error:  # jinja's, and whatever the template itself raises
            raise ValueError(
                f"the chat template of --tokenizer-model {self._name} cannot write this "
                f"conversation of roles {[message['role'] for message in messages]}: {error}"
            ) from error

    def _find_end_ids(self) -> frozenset[int]:
        """The end of text, and the special token with which the template ends an answer."""
        tokenizer = self._tokenizer
        question = [{"role": "user", "content": "a"}]
        before = self._apply(question, None, add_generation_prompt=True)
        answer = [*question, {"role": "assistant", "content": "a"}]
        turn = self._apply(answer, None, add_generation_prompt=False)[len(before) :]
        ends = {tokenizer.eos_token_id} - {None}
        special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
        while turn and turn[-1] not in special and not tokenizer.decode(turn[-1:]).strip():
            turn.pop()
        return frozenset(ends | (special & set(turn[-1:])))


def _require_answer(messages: Sequence[Message]) -> None:
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError(
            "no answer: none of the roles "
            f"{[message['role'] for message in messages]} is assistant, so there is nothing to "
            "train on; drop the line, or name the role of the answers assistant"
        )
