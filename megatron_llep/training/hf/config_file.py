"""One `config.json` of a Hugging Face folder, read without transformers."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_MISSING = object()


@dataclass(frozen=True)
class HFConfig:
    """The values of a `config.json`, and where it lies."""

    path: Path
    values: Mapping[str, Any]

    @property
    def model_type(self) -> str:
        """The architecture's short name, such as `qwen3_moe`."""
        return str(self.require("model_type"))

    def require(self, *names: str) -> Any:
        """The value of the first of these names that the file has.

        Raises:
            ValueError: it has none of them.
        """
        value = self.get(*names, default=_MISSING)
        if value is _MISSING:
            raise ValueError(
                f"{self.path} has no {' or '.join(names)}; take the file from a folder that "
                "transformers' save_pretrained wrote"
            )
        return value

    def get(self, *names: str, default: Any = None) -> Any:
        """The value of the first of these names that the file has and that is not null."""
        for name in names:
            if self.values.get(name) is not None:
                return self.values[name]
        return default

    def refuse(self, name: str, value: object, reason: str) -> ValueError:
        """The error for a value that Megatron cannot train."""
        return ValueError(f"{self.path}: {name} {value}: {reason}")


def read_config(flag: str, folder: Path) -> HFConfig:
    """Read a folder's `config.json`.

    Args:
        flag: the command line's, for errors.
        folder: what the flag names.

    Raises:
        ValueError: there is no such folder or file, or it holds no JSON object.
    """
    if not folder.is_dir():
        raise ValueError(
            f"{flag} {folder}: no such folder; give one on this machine that holds config.json "
            "and *.safetensors (a name on the Hugging Face hub must be downloaded first)"
        )
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(
            f"{flag} {folder}: the folder has no config.json; give one that transformers' "
            "save_pretrained wrote, or that was downloaded whole"
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{flag} {folder}: {path} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{flag} {folder}: {path} is not a JSON object")
    return HFConfig(path, values)
