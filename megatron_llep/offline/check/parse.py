"""Megatron's own parser, for flags of which it may not know all, and without its validation.

That asks for the world that a configuration is made for, and for a GPU.
"""

import argparse
import warnings
from argparse import Namespace
from dataclasses import dataclass
from typing import NoReturn

from megatron_llep.offline.launch.flags import Flags, format_flags


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


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)

    def is_read(self, flag: str, value: object) -> str | None:
        """Why a flag cannot have this value; None if it can."""
        try:
            self.parse_args(self.format({flag: value}))
        except Exception as error:  # whatever the flag's own type raises
            return str(error) if isinstance(error, ValueError) else f"{flag} {value}: {error!r}"
        return None

    def format(self, flags: Flags) -> list[str]:
        """Command-line tokens; several values may stand in one text, as in Megatron's tests."""
        split = {
            flag: value.strip("[]").replace(",", " ").split()
            if isinstance(value, str) and self._option_string_actions[flag].nargs in ("+", "*")
            else value
            for flag, value in flags.items()
        }
        return format_flags(split)


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

    def read(self, flags: Flags) -> Parsed:
        """Parse what can be parsed."""
        known = {
            flag: value
            for flag, value in flags.items()
            if flag in self._parser._option_string_actions
        }
        unreadable: dict[str, str] = {}
        try:
            args = self._parser.parse_args(self._parser.format(known))
        except Exception:  # which of them?
            for flag, value in known.items():
                reason = self._parser.is_read(flag, value)
                if reason is not None:
                    unreadable[flag] = reason
            known = {flag: value for flag, value in known.items() if flag not in unreadable}
            args = self._parser.parse_args(self._parser.format(known))
        return Parsed(
            args=args,
            given=known,
            unknown=[flag for flag in flags if flag not in known and flag not in unreadable],
            unreadable=list(unreadable.values()),
        )
