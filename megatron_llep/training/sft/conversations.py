"""JSONL files of conversations, in the forms that people bring."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_llep.training.chat import Message


@dataclass(frozen=True)
class Conversation:
    """One line of a file."""

    path: Path
    line: int
    """From 1."""
    messages: Sequence[Message]
    tools: Sequence[Any] | None
    """For chat templates that know tools."""

    @property
    def place(self) -> str:
        """For messages."""
        return f"{self.path}:{self.line}"


def read_conversations(path: Path) -> Iterator[Conversation]:
    """Read a JSONL file; empty lines count, and are skipped.

    Raises:
        ValueError: names file, line and the way out.
    """
    if not path.is_file():
        raise ValueError(f"--data-path {path}: no such file; give a JSONL file of conversations")
    found = False
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                found = True
                entry, messages = _parse(line, f"{path}:{number}")
                yield Conversation(path, number, messages, entry.get("tools"))
    if not found:
        raise ValueError(f"--data-path {path}: the file is empty; give one conversation a line")


def _parse(line: bytes, place: str) -> tuple[dict[str, Any], list[Message]]:
    try:
        entry = json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{place}: not JSON ({error}); give one JSON object a line") from None
    if not isinstance(entry, dict):
        raise ValueError(
            f"{place}: a JSON {type(entry).__name__}, not an object; give {_describe_forms()}"
        )
    form = next((form for form in _FORMS if set(form.keys) <= entry.keys()), None)
    if form is None:
        raise ValueError(f"{place}: no known key among {sorted(entry)}; give {_describe_forms()}")
    messages = form.read(entry, place)
    if not messages:
        raise ValueError(f"{place}: no messages; drop the line")
    return entry, messages


@dataclass(frozen=True)
class _Form:
    """A way to write a conversation as a JSON object, known by its keys."""

    keys: tuple[str, ...]
    read: Callable[[Mapping[str, Any], str], list[Message]]


def _read_messages(entry: Mapping[str, Any], place: str) -> list[Message]:
    messages = entry["messages"]
    if not isinstance(messages, list):
        raise ValueError(f"{place}: messages is no list; give a list of objects with role, content")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(
                f"{place}: a message without a role: {str(message)[:80]}; give each role, content"
            )
    return messages


_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}


def _read_sharegpt(entry: Mapping[str, Any], place: str) -> list[Message]:
    try:
        turns = [(turn["from"], turn["value"]) for turn in entry["conversations"]]
    except (TypeError, KeyError) as error:
        raise ValueError(
            f"{place}: conversations lacks {error}; give each turn from and value"
        ) from None
    return [{"role": _SHAREGPT_ROLES.get(who, who), "content": text} for who, text in turns]


def _read_pair(question: str, answer: str) -> _Form:
    """A question and its answer under these keys: text, or lists of messages."""

    def read(entry: Mapping[str, Any], place: str) -> list[Message]:
        messages: list[Message] = []
        for key, role in ((question, "user"), (answer, "assistant")):
            value = entry[key]
            if isinstance(value, list):
                messages += _read_messages({"messages": value}, place)
            elif isinstance(value, str):
                messages.append({"role": role, "content": value})
            else:
                raise ValueError(
                    f"{place}: {key} is {type(value).__name__}; give text, or a list of messages"
                )
        return messages

    return _Form((question, answer), read)


def _read_alpaca(entry: Mapping[str, Any], place: str) -> list[Message]:
    question = "\n\n".join(filter(None, (entry["instruction"], entry.get("input"))))
    return _read_pair("question", "output").read({**entry, "question": question}, place)


_FORMS = (
    _Form(("messages",), _read_messages),
    _Form(("conversations",), _read_sharegpt),
    _read_pair("prompt", "completion"),
    _read_pair("query", "response"),
    _Form(("instruction", "output"), _read_alpaca),
)


def _describe_forms() -> str:
    return "one of " + "; ".join(" and ".join(form.keys) for form in _FORMS)
