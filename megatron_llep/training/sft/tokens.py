"""A file of conversations as arrays of tokens, made once a run and, with a cache, once for all.

Letters: N examples, T tokens of all of them.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from megatron_llep.training.chat import Chat, Example
from megatron_llep.training.sft.conversations import read_conversations


@dataclass(frozen=True, kw_only=True)
class TokenFile:
    """The examples of one file, each as inputs and the labels that follow them.

    Labels are shifted within an example, whose last token is no input: nothing crosses its border.
    """

    path: str
    inputs: np.ndarray
    """int32 [T]."""
    labels: np.ndarray
    """int32 [T]."""
    trained: np.ndarray
    """bool [T], whether a label counts."""
    starts: np.ndarray
    """int64 [N], where each example starts."""
    ends: np.ndarray
    """int64 [N], where it ends."""
    lines: np.ndarray
    """int64 [N], the line it came from, from 1, in ascending order."""

    @property
    def lengths(self) -> np.ndarray:
        """int64 [N], tokens of each example."""
        return self.ends - self.starts

    def limit(self, most: int, *, truncate: bool) -> tuple["TokenFile", str | None]:
        """Hold every example to a length.

        Args:
            most: tokens of an example.
            truncate: cut longer ones at their end, and drop those that keep no answer.

        Returns:
            The file, and what had to be done, for people.

        Raises:
            ValueError: some are longer and may not be cut, or none is left.
        """
        is_long = self.lengths > most
        if not is_long.any():
            return self, None
        first = int(np.argmax(is_long))
        counted = (
            f"{self.path}: {is_long.sum()} of {is_long.size} examples are longer than --seq-length "
            f"{most} (the first in line {self.lines[first]}, of {self.lengths[first]} tokens)"
        )
        if not truncate:
            raise ValueError(
                f"{counted}; raise --seq-length, shorten them, or give --sft-truncate to cut them "
                "at their end"
            )
        ends = np.minimum(self.ends, self.starts + most)
        answers = np.cumsum(np.concatenate(([0], self.trained)))
        is_kept = answers[ends] > answers[self.starts]
        if not is_kept.any():
            raise ValueError(f"{counted}; no answer is left when they are cut; raise --seq-length")
        kept = replace(
            self, starts=self.starts[is_kept], ends=ends[is_kept], lines=self.lines[is_kept]
        )
        return kept, f"{counted}: cut, and {np.sum(~is_kept)} dropped that kept no answer"


def load_tokens(path: str, chat: Chat, *, cache: str | None, key: object) -> TokenFile:
    """Read and tokenize a file, or take the result from the cache.

    Args:
        path: of the JSONL file.
        chat: how its conversations are written.
        cache: folder of results (Megatron's --data-cache-path); None: none is kept.
        key: what the tokens depend on besides the file; its `repr` says it all.

    Raises:
        ValueError: names file, line and the way out.
    """
    if cache is None or not Path(path).is_file():
        return _tokenize(path, chat)
    status = os.stat(path)
    identity = json.dumps([os.path.abspath(path), status.st_size, status.st_mtime_ns, repr(key)])
    digest = hashlib.sha256(identity.encode()).hexdigest()[:24]
    stored = Path(cache, f"{Path(path).stem}-{digest}.npz")
    if stored.is_file():
        with np.load(stored) as arrays:
            return TokenFile(path=path, **arrays)
    tokens = _tokenize(path, chat)
    stored.parent.mkdir(parents=True, exist_ok=True)
    # Under another name first: several ranks may write it, and none may read half of it.
    part = stored.with_suffix(f".{os.getpid()}.part.npz")
    np.savez(part, **{name: value for name, value in vars(tokens).items() if name != "path"})
    part.rename(stored)
    return tokens


def _tokenize(path: str, chat: Chat) -> TokenFile:
    examples: list[Example] = []
    lines: list[int] = []
    for conversation in read_conversations(Path(path)):
        try:
            written = chat.encode(conversation.messages, conversation.tools)
        except ValueError as error:
            raise ValueError(f"{conversation.place}: {error}") from error
        examples += written
        lines += [conversation.line] * len(written)

    def join(parts: Sequence[list], kind: type) -> np.ndarray:
        return np.concatenate([np.array(part, dtype=kind) for part in parts])

    borders = np.cumsum([0, *(len(example.ids) - 1 for example in examples)])
    return TokenFile(
        path=path,
        inputs=join([example.ids[:-1] for example in examples], np.int32),
        labels=join([example.ids[1:] for example in examples], np.int32),
        trained=join([example.trained[1:] for example in examples], np.bool_),
        starts=borders[:-1],
        ends=borders[1:],
        lines=np.array(lines),
    )
