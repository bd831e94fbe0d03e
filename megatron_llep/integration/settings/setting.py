"""One setting of Megatron, and what LLEP does about it."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Verdict = Literal["supported", "replaced", "refused", "untried"]


def _is_never_set(source: Any) -> bool:
    return False


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One row of the table: what it is, how it is seen, and LLEP's verdict.

    A source is a `TransformerConfig`, or Megatron's arguments under its names
    (`source.read_arguments_as_config`).
    """

    verdict: Verdict
    """supported: as in plain Megatron. replaced: something else runs, and a notice says so.
    refused: at start-up. untried: neither tested nor refused."""
    text: str
    """What it means; for what is replaced, what runs and what is given up; for what is refused,
    the reason and the way out."""
    flag: str = ""
    """On the command line; empty where a row is about several, or about none."""
    title: str = ""
    """The setting in the documentation, in Markdown. Default: the flag."""
    name: str = ""
    """The field of the source that the flag sets; empty where the table does not look at it."""
    is_set: Callable[[Any], bool] = _is_never_set
    """Whether a source has it set."""
    value: Callable[[Any], object] | None = None
    """What a refusal says of a source. Default: the field's value."""
    runs: Mapping[str, object] = field(default_factory=dict)
    """For what is replaced: the fields of the configuration that say what runs instead."""
    dispatchers: tuple[str, ...] = ("alltoall", "flex")
    """For what is replaced: with which of `--moe-llep-dispatcher` it is."""
    is_built_in: bool = False
    """For what is replaced: whether layers that were built with it keep it for good."""
    is_read_by_loop: bool = False
    """For what is replaced: whether Megatron's training loop reads it in its arguments, too."""

    @property
    def spans(self) -> list[str]:
        """All flags that the row is about, some with a value."""
        return re.findall(r"`(--[^`]+)`", self.shown)

    @property
    def shown(self) -> str:
        """The setting in the documentation, in Markdown."""
        return self.title or f"`{self.flag}`"

    def describe(self, source: Any) -> str:
        """The flag, with its value in a source."""
        value = getattr(source, self.name)
        return self.flag if value is True else f"{self.flag} {value}"


def has_value(name: str, *, unless: tuple = (None, False)) -> Callable[[Any], bool]:
    """Whether a source has a field of this name with a value other than these."""

    def is_set(source: Any) -> bool:
        return getattr(source, name, unless[0]) not in unless

    return is_set


def has_one_of(name: str, *values: object) -> Callable[[Any], bool]:
    """Whether a source has a field of this name with one of these values."""

    def is_set(source: Any) -> bool:
        return getattr(source, name, None) in values

    return is_set
