"""Megatron's own parser, for flags of which it may not know all, and without its validation.

That asks for the world that a configuration is made for, and for a GPU.
"""

import argparse
import warnings
from argparse import Namespace
from dataclasses import dataclass
from typing import NoReturn

from megatron_llep.offline.check.fill import is_open
from megatron_llep.offline.launch.flags import Flags, format_flags

_WORDS = {"true": True, "false": False, "null": None, "none": None}


@dataclass(frozen=True, kw_only=True)
class Parsed:
    """What was read of one configuration."""

    args: Namespace
    given: Flags
    """What the parser knows."""
    unknown: list[str]
    """Flags of which neither Megatron nor LLEP knows."""
    unreadable: list[str]
    """Flags with a value that they do not take, and why."""
    open: Flags
    """Flags whose value nobody has filled in, as `${EP}`."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)

    def is_read(self, flag: str, value: object) -> str | None:
        """Why a flag cannot have this value; None if it can."""
        try:
            self.parse_args(format_flags({flag: value}))
        except Exception as error:  # whatever the flag's own type raises
            return str(error) if isinstance(error, ValueError) else f"{flag} {value}: {error!r}"
        return None


class FlagReader:
    """Reads the flags of configurations; building Megatron's parser takes a while."""

    def __init__(self) -> None:
        from megatron_llep.device import prepare_megatron_training, use_cpu_if_no_gpu

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            use_cpu_if_no_gpu()
            prepare_megatron_training()
            from megatron.training.arguments import add_megatron_arguments

            from megatron_llep.integration.arguments import add_llep_arguments

            self._parser = _Parser(allow_abbrev=False)
            add_llep_arguments(add_megatron_arguments(self._parser))
        self._actions = self._parser._option_string_actions
        self._by_dest = {action.dest: action for action in self._parser._actions}

    def knows(self, name: str) -> bool:
        """Whether Megatron or LLEP knows a flag of this name."""
        return self._find_flag(name) in self._actions

    def read(self, flags: Flags) -> Parsed:
        """Parse what can be parsed.

        Args:
            flags: names may be without leading dashes, with underscores, or the names that
                Megatron's arguments have after parsing (`fp8`).
        """
        named = {self._find_flag(name): self._read_value(name, flags[name]) for name in flags}
        known = {flag: value for flag, value in named.items() if flag in self._actions}
        open_, unreadable = {}, {}
        try:
            args = self._parser.parse_args(format_flags(known))
        except Exception:  # which of them?
            for flag, value in known.items():
                reason = self._parser.is_read(flag, value)
                if reason is not None and is_open(value):
                    open_[flag] = value
                elif reason is not None:
                    unreadable[flag] = reason
            known = {
                flag: value
                for flag, value in known.items()
                if flag not in unreadable and flag not in open_
            }
            args = self._parser.parse_args(format_flags(known))
        return Parsed(
            args=args,
            given=known,
            unknown=[flag for flag in named if flag not in self._actions],
            unreadable=list(unreadable.values()),
            open=open_,
        )

    def _find_flag(self, name: str) -> str:
        """The flag that a name means; the name itself if none."""
        bare = name.strip("-")
        action = self._by_dest.get(bare.replace("-", "_"))
        names = [name, "--" + bare.replace("_", "-"), *(action.option_strings if action else ())]
        return next((each for each in names if each in self._actions), name)

    def _read_value(self, name: str, value: object) -> object:
        """As `format_flags` takes it. Texts are read as a shell reads them."""
        flag = self._find_flag(name)
        action = self._actions.get(flag)
        if action is None:
            return value
        if isinstance(value, list) and len(value) < 2:
            value = value[0] if value else None
        if action.nargs == 0 and value in (0, 1):
            value = bool(value)
        if isinstance(value, str):
            if value[:1] == value[-1:] and value[:1] in ("'", '"'):
                value = value[1:-1]
            if action.nargs == 0 or value.lower() == "null":
                value = _WORDS.get(value.lower(), value)
            elif action.nargs is not None:  # several may stand in one text
                return value.strip("[]").replace(",", " ").split()
        if isinstance(value, list) and action.nargs is None:
            text = ",".join(map(str, value))
            return text if self._parser.is_read(flag, text) is None else f"[{text}]"
        is_off = isinstance(action, argparse._StoreFalseAction)
        if is_off and isinstance(value, bool) and name.strip("-").replace("-", "_") == action.dest:
            return not value  # named is what the flag switches off
        return value
