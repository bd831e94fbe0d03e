"""Variables in the values of flags, as `${EP}` or `${EP:-8}`, filled in without a shell."""

import re
from collections.abc import Mapping

from megatron_llep.offline.launch.flags import Flags

# With a default after :-, -, := or, as Primus writes it, a colon alone.
_VARIABLE = re.compile(r"\$\{(\w+)(?:(?::?[-=]|:(?!\?))([^${}]*))?\}|\$(\w+)")


def fill(flags: Mapping[str, object], variables: Mapping[str, object]) -> Flags:
    """The flags, with variables in their values filled in; what nobody sets stays as it is."""
    return {flag: _fill_value(value, variables) for flag, value in flags.items()}


def is_open(value: object) -> bool:
    """Whether a value holds a variable that nobody has filled in."""
    return "$" in str(value)


def _fill_value(value: object, variables: Mapping[str, object]) -> object:
    if isinstance(value, list):
        filled = [_fill_value(each, variables) for each in value]
        return [w for each in filled for w in (each.split() if isinstance(each, str) else [each])]
    return _expand(value, variables) if isinstance(value, str) else value


def _expand(text: str, variables: Mapping[str, object]) -> str:
    def look_up(found: re.Match[str]) -> str:
        name, default = found[1] or found[3], found[2]
        if name not in variables:
            return found[0] if default is None else default
        # A variable may be set from others, and from what it was, as in TP=${TP:-1}.
        others = {other: value for other, value in variables.items() if other != name}
        return _expand(str(variables[name]), others)

    return _VARIABLE.sub(look_up, text)
