"""Copies of Megatron's specifications with some parts replaced, wherever these stand.

Specifications are dataclasses, lists and partial calls within each other: of a layer, of a block of
layers, of a hybrid stack.
"""

import copy
from collections.abc import Callable, Iterable
from dataclasses import is_dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

Change = Callable[[Any, str], Any]
"""Takes a part and where it stands, in words; returns what replaces it, or the very same object."""


def replace_parts(spec: Any, change: Change, path: str = "the specification") -> Any:
    """Copy a specification with parts replaced.

    Args:
        spec: a specification, or a part of one.
        change: is not asked about parts of what it has replaced.
        path: where the part stands, for messages.

    Returns:
        A copy of whatever holds a replaced part; the very same object where nothing is replaced.
    """
    changed = change(spec, path)
    if changed is not spec:
        return changed
    if isinstance(spec, partial):
        args = replace_parts(spec.args, change, path)
        changes = _replace_in(spec.keywords.items(), change, path)
        if args is spec.args and not changes:
            return spec
        return partial(spec.func, *args, **{**spec.keywords, **changes})
    if type(spec) in (list, tuple):
        changes = _replace_in(enumerate(spec), change, path)
        return type(spec)(changes.get(n, each) for n, each in enumerate(spec)) if changes else spec
    if type(spec) is dict:
        changes = _replace_in(spec.items(), change, path)
        return spec | changes if changes else spec
    if isinstance(spec, type):
        return spec
    if hasattr(spec, "__dict__") and (is_dataclass(spec) or isinstance(spec, SimpleNamespace)):
        changes = _replace_in(vars(spec).items(), change, path)
        return copy_with(spec, **changes) if changes else spec
    return spec


def copy_with(spec: Any, **changes: Any) -> Any:
    """A shallow copy with other attributes, also where it is frozen."""
    copied = copy.copy(spec)
    for name, value in changes.items():
        object.__setattr__(copied, name, value)
    return copied


def _replace_in(named: Iterable[tuple[Any, Any]], change: Change, path: str) -> dict[Any, Any]:
    """The values that change, by name."""
    replaced = {
        name: (value, replace_parts(value, change, f"{path}, {name}")) for name, value in named
    }
    return {name: after for name, (before, after) in replaced.items() if after is not before}
