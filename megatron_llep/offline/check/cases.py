"""Training configurations in a file, as Megatron's functional tests and others write them."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megatron_llep.offline.check.fill import fill
from megatron_llep.offline.check.shell import read_script
from megatron_llep.offline.launch.flags import SECTIONS, Flags, load_config, read_document

_OWN_KEYS = {*SECTIONS, "BASE", "SCRIPT"}
_PRIMUS = Path("primus/configs")


def read_cases(path: Path, knows: Callable[[str], bool]) -> dict[str, Flags]:
    """The configurations of one file, by name.

    Args:
        path: YAML: flags under `MODEL_ARGS`, beside other keys (`TEST_TYPE`, ...) or with the
            sections of `configs/`; or under the name of each of many configurations; or Primus's
            `modules: NAME: overrides:`. `ENV_VARS` fill in what is written as `${NAME}`. Else a
            shell script.
        knows: whether Megatron knows a flag of this name, which may be without leading dashes.

    Raises:
        ValueError: no such file, not YAML, or there are no flags in it.
    """
    if path.suffix in (".sh", ".bash", ".sbatch", ".slurm") and path.is_file():
        flags = read_script(path)
        cases = {f"{path.name}, all its branches": flags} if any(map(knows, flags)) else {}
        flags.setdefault("--num-experts", "$(not in the script)")  # what it calls may have them
    else:
        cases = dict(_list_cases(path, knows))
    if not cases:
        raise ValueError(
            f"configuration {path}: no flags found; write them as --flag: value, under MODEL_ARGS "
            "or under the names of several configurations, or give them after --"
        )
    return cases


def _list_cases(path: Path, knows: Callable[[str], bool]) -> Iterator[tuple[str, Flags]]:
    def holds_flags(value: Any) -> bool:
        if not isinstance(value, dict) or not value:
            return False
        names = [str(name) for name in value]
        return all(name.startswith("--") for name in names) or any(map(knows, names))

    document = read_document(path)
    found: dict[str, Any]
    if ("MODEL_ARGS" in document or "BASE" in document) and set(document) <= _OWN_KEYS:
        sections = load_config(path).values()
        found = {path.name: {flag: value for part in sections for flag, value in part.items()}}
    elif "MODEL_ARGS" in document:
        found = {path.name: document["MODEL_ARGS"]}
    elif isinstance(document.get("modules"), dict):
        modules = document["modules"].items()
        found = {f"{path.name}: {name}": _read_module(each, path) for name, each in modules}
    elif holds_flags(document):
        found = {path.name: _with_bases(document, path)}
    else:
        found = document
    variables = document.get("ENV_VARS") or {}
    for name, flags in found.items():
        if holds_flags(flags):
            yield str(name), fill(flags, variables)


def _read_module(module: Any, path: Path) -> Flags | None:
    """The flags of one of Primus's modules: what its files say, and what overrides them."""
    if not isinstance(module, dict) or not isinstance(module.get("overrides"), dict):
        return None
    flags: Flags = {}
    for kind, key in (("modules", "config"), ("models", "model")):
        name = fill({key: module.get(key)}, {})[key]
        if name is None:
            continue
        below = _PRIMUS / kind / str(module.get("framework")) / str(name)
        file = next((each for folder in path.parents if (each := folder / below).is_file()), None)
        if file is not None:
            flags |= _with_bases(read_document(file), file)
        elif key == "model":
            flags["num_experts"] = flags["expert_model_parallel_size"] = f"$(in {name})"
    return flags | module["overrides"]


def _with_bases(document: dict[str, Any], path: Path) -> Flags:
    """What a file says, over what the files say that it extends."""
    flags: Flags = {}
    for name in document.pop("extends", None) or []:
        base = path.parent / str(name)
        flags |= _with_bases(read_document(base), base)
    return flags | document
