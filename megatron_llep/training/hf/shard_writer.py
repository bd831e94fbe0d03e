"""Writes tensors to `*.safetensors` as they come, in files of a bounded size, with their index."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from megatron_llep.training.hf.weight_files import INDEX, SINGLE

MAX_FILE_BYTES = 5 * 10**9
"""As transformers cuts them."""


class ShardWriter:
    """Collects one file's worth of tensors at a time."""

    def __init__(self, folder: Path, max_file_bytes: int = MAX_FILE_BYTES) -> None:
        self._folder = folder
        self._max_file_bytes = max_file_bytes
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = 0
        self._total_bytes = 0
        self._files: list[list[str]] = []
        """Names of the tensors in each file that is written."""

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take the next tensor; writes a file when enough are there.

        Raises:
            OSError: the file cannot be written.
        """
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + size > self._max_file_bytes:
            self._flush()
        self._pending[name] = tensor.contiguous()
        self._pending_bytes += size
        self._total_bytes += size

    def finish(self) -> None:
        """Write the last file and, if there are several, their index.

        Raises:
            OSError: a file cannot be written.
        """
        self._flush()
        count = len(self._files)
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._files, start=1):
            name = SINGLE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
            self._part(number).rename(self._folder / name)
            weight_map |= dict.fromkeys(names, name)
        if count > 1:
            index = {
                "metadata": {"total_size": self._total_bytes},
                "weight_map": dict(sorted(weight_map.items())),
            }
            (self._folder / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")

    def _part(self, number: int) -> Path:
        return self._folder / f"part-{number:05d}.safetensors"

    def _flush(self) -> None:
        self._files.append(list(self._pending))
        save_file(self._pending, self._part(len(self._files)), metadata={"format": "pt"})
        self._pending = {}
        self._pending_bytes = 0
