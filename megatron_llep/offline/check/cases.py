"""Training configurations in a YAML file, as Megatron's functional tests and others write them."""

from pathlib import Path
from typing import Any

from megatron_llep.offline.launch.flags import SECTIONS, Flags, load_config, read_document

_OWN_KEYS = {*SECTIONS, "BASE", "SCRIPT"}


def read_cases(path: Path) -> dict[str, Flags]:
    """The configurations of one file, by name.

    Args:
        path: flags under `MODEL_ARGS`, beside other keys (`ENV_VARS`, `TEST_TYPE`, ...) or with the
            sections of `configs/`; or under the name of each of many configurations.

    Raises:
        ValueError: no such file, not YAML, or there are no flags in it.
    """
    document = read_document(path)
    if "MODEL_ARGS" in document or "BASE" in document:
        if set(document) <= _OWN_KEYS:
            sections = load_config(path).values()
            return {path.name: {flag: value for part in sections for flag, value in part.items()}}
        document = {path.name: document.get("MODEL_ARGS")}
    elif _holds_flags(document):
        document = {path.name: document}
    cases = {str(name): flags for name, flags in document.items() if _holds_flags(flags)}
    if not cases:
        raise ValueError(
            f"configuration {path}: no flags found; write them as --flag: value, under MODEL_ARGS "
            "or under the names of several configurations"
        )
    return cases


def _holds_flags(value: Any) -> bool:
    return (
        isinstance(value, dict) and bool(value) and all(str(key).startswith("--") for key in value)
    )
