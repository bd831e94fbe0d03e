"""Megatron's flags: from YAML files, from options of ours, and into a command line."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

SECTIONS = ("MODEL_ARGS", "LAYOUT_ARGS", "LLEP_ARGS")

Flags = dict[str, object]
"""Flag with its leading dashes -> scalar, bool, None or list of values."""


def load_config(path: Path) -> dict[str, Flags]:
    """Read one YAML file, and the one that it names as its BASE, whose flags it overrides.

    Returns:
        Section name -> flags, with every section of SECTIONS present.

    Raises:
        ValueError: no such file, not YAML, an unknown section, a key that is no flag, or a flag
            that two sections give.
    """
    document = read_document(path)
    base = document.pop("BASE", None)
    document.pop("SCRIPT", None)
    for name, flags in document.items():
        if name not in SECTIONS:
            raise ValueError(
                f"configuration {path}: unknown section {name}; choose from {', '.join(SECTIONS)}"
            )
        if not isinstance(flags, dict):
            raise ValueError(f"configuration {path}: {name} must map flags to values")
        for flag in flags:
            if not str(flag).startswith("--"):
                raise ValueError(
                    f"configuration {path}: {name} has {flag!r}, which is no flag: write --{flag}"
                )
    below: Mapping[str, Flags] = {} if base is None else load_config(path.parent / str(base))
    sections = {name: below.get(name, {}) | document.get(name, {}) for name in SECTIONS}
    if not sections["MODEL_ARGS"]:
        raise ValueError(f"configuration {path} has no MODEL_ARGS section")
    seen: dict[str, str] = {}
    for name, flags in sections.items():
        for flag in flags:
            if flag in seen:
                raise ValueError(
                    f"configuration {path}: {flag} is in {seen[flag]} and in {name}; keep one"
                )
            seen[flag] = name
    return sections


def find_script(path: Path) -> str | None:
    """The training script that a YAML file, or its BASE, is for: SCRIPT, from the checkout's root.

    Raises:
        ValueError: no such file, or not YAML.
    """
    document = read_document(path)
    if "SCRIPT" in document or "BASE" not in document:
        return document.get("SCRIPT")
    return find_script(path.parent / str(document["BASE"]))


def read_document(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping.

    Raises:
        ValueError: no such file, or not YAML.
    """
    if not path.is_file():
        raise ValueError(f"configuration {path}: no such file; see configs/ for those that exist")
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"configuration {path} is not valid YAML: {error}") from error
    if not isinstance(document, dict):
        raise ValueError(f"configuration {path} has no MODEL_ARGS section")
    return document


def parse_override(text: str) -> Flags:
    """Read one --set value, FLAG or FLAG=VALUE, leading dashes optional, VALUE as in YAML.

    A VALUE that begins with an asterisk is text, such as a pattern of layers: one value has no
    other that YAML could refer to.

    Raises:
        ValueError: there is no flag name, or the value is not YAML.
    """
    name, has_value, value = text.partition("=")
    name = name.lstrip("-")
    if not name:
        raise ValueError(f"--set {text}: give a flag, such as --set --train-iters=50")
    if value.startswith("*"):
        return {f"--{name}": value}
    try:
        return {f"--{name}": yaml.safe_load(value) if has_value else True}
    except yaml.YAMLError as error:
        raise ValueError(f"--set {text}: the value is not valid YAML") from error


def split_extra(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """A script's own arguments, and Megatron's flags after `--`."""
    end = list(argv).index("--") if "--" in argv else len(argv)
    return list(argv[:end]), list(argv[end + 1 :])


def parse_extra(tokens: Sequence[str]) -> Flags:
    """Read what follows `--`: `--flag`, `--flag=value` or `--flag value value ...`.

    Raises:
        ValueError: the first token is no flag.
    """
    flags: Flags = {}
    values: list[str] = []
    for token in tokens:
        if token.startswith("--"):
            flag, has_value, value = token.partition("=")
            values = [value] if has_value else []
            flags[flag] = values
        elif not flags:
            raise ValueError(f"{token!r} after -- is no flag: write --flag value")
        else:
            values.append(token)
    return {flag: values or True for flag, values in flags.items()}


def format_flags(flags: Mapping[str, object]) -> list[str]:
    """Turn flags into command-line tokens, in the order of their first mention."""
    tokens: list[str] = []
    for flag, value in flags.items():
        if value is None or value is False:
            continue
        tokens.append(flag)
        if value is not True:
            tokens += [str(v) for v in value] if isinstance(value, list) else [str(value)]
    return tokens


def read_value(flags: Mapping[str, object], flag: str, default: object = None) -> object:
    """The value of a flag; of several values the last, as of a flag that is given twice."""
    value = flags.get(flag)
    if isinstance(value, list):
        value = value[-1]
    return default if value is None else value
