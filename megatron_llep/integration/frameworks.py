"""What the adapters for training frameworks share: settings from a mapping, the check of a seam.

An adapter is the file of its framework's name. It is never loaded by itself, and imports its
framework where it is used; `docs/frameworks.md` says how each is switched on.
"""

import importlib
import importlib.metadata
from collections.abc import Mapping, MutableMapping
from dataclasses import fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from megatron_llep.config import LLEPConfig

KEY = "llep"
"""Under which a framework's configuration holds the settings."""

TRIED = {
    "megatron-bridge": "0.6.2",
    "verl": "0.9.1",
    "ms-swift": "4.6.0",
    "mcore-bridge": "1.6.5",
    "slime": "624b824a",
    "nemo-rl": "7ea279ab",
}
"""Versions whose packages, or whose source (a commit), the adapters were tried with."""


class SeamError(RuntimeError):
    """A framework lacks what its adapter builds on: it is another version, or not complete."""


def settings_from(settings: Mapping[str, Any] | bool | None, where: str) -> LLEPConfig:
    """LLEPConfig from what YAML, JSON or OmegaConf give.

    Args:
        settings: fields of LLEPConfig by name; or whether LLEP is on. None: its defaults.
        where: they stand, as a user writes it, such as `policy.megatron_cfg.llep`.

    Raises:
        ValueError: names the setting, its value and the way out.
    """
    if settings is None:
        return LLEPConfig()
    if isinstance(settings, bool):
        return LLEPConfig(enabled=settings)
    known = {field.name: _types_of(hint) for field, hint in _hints()}
    if not isinstance(settings, Mapping):
        raise ValueError(f"{where} {settings!r}: give settings by name: {', '.join(known)}")
    for name, value in settings.items():
        if name not in known:
            raise ValueError(f"{where}.{name}: no setting of LLEP; there are {', '.join(known)}")
        if type(value) not in known[name]:
            kinds = " or ".join(
                sorted("null" if each is _NONE else each.__name__ for each in known[name])
            )
            raise ValueError(f"{where}.{name} {value!r}: give {kinds}")
    return LLEPConfig(**{str(name): value for name, value in settings.items()})


def take_settings(configuration: MutableMapping[str, Any], where: str) -> LLEPConfig:
    """`settings_from` the key `llep` of a mapping that goes on to others, who do not know it.

    Args:
        configuration: loses the key.
        where: it stands, as a user writes it.

    Raises:
        ValueError: as `settings_from`.
    """
    return settings_from(configuration.pop(KEY, None), f"{where}.{KEY}")


def find_seam(package: str, module: str, *names: str) -> Any:
    """What an adapter builds on, looked for by name.

    Args:
        package: as installed, a key of `TRIED`.
        module: in which it should be.
        names: of it: an attribute of the module, an attribute of that, and so on.

    Raises:
        SeamError: names the package, its version, what is missing, and the version that has it.
    """
    try:
        found: Any = importlib.import_module(module)
    except ImportError as error:
        raise missing_seam(package, module, f" ({error})") from error
    for number, name in enumerate(names, start=1):
        try:
            found = getattr(found, name)
        except AttributeError as error:
            raise missing_seam(package, ".".join((module, *names[:number]))) from error
    return found


def missing_seam(package: str, what: str, because: str = "") -> SeamError:
    """The error that says so."""
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        version = "(no version: not installed as a package)"
    return SeamError(
        f"megatron_llep: {package} {version} has no {what}, by which LLEP is switched on "
        f"there{because}; tried was {package} {TRIED[package]}. Switch it on by convert_model, "
        "after the model is built: docs/frameworks.md"
    )


_NONE = type(None)


def _hints() -> list[tuple[Any, Any]]:
    hints = get_type_hints(LLEPConfig)
    return [(field, hints[field.name]) for field in fields(LLEPConfig)]


def _types_of(hint: Any) -> set[type]:
    """The types of values that fit an annotation. A whole number fits where a float does."""
    if get_origin(hint) is Literal:
        return {type(value) for value in get_args(hint)}
    if parts := get_args(hint):
        return set().union(*(_types_of(part) for part in parts))
    return {hint, int} if hint is float else {hint}
