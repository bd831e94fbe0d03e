"""The weights of a Hugging Face folder as megatron-bridge asks for them, read when it does.

Bridge knows the names that models have on disk. Experts that transformers 5 holds in one tensor,
and may write so, are cut; rows are added to a vocabulary that tensor parallelism pads.

Letters: E experts, h hidden size, f expert width, V vocabulary.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from safetensors import safe_open

from megatron_llep.training.hf.weight_files import StoredTensor

EMBEDDING = "model.embed_tokens.weight"
OUTPUT = "lm_head.weight"
_FUSED = re.compile(r"(model\.layers\.\d+\.mlp\.experts)\.(gate_up_proj|down_proj)")
_EXPERT = re.compile(r"(model\.layers\.\d+\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")


class FolderWeights(Mapping[str, torch.Tensor]):
    """Name -> tensor, on the CPU.

    Args:
        tensors: what the folder holds.
        model_type: that of `config.json`.
        tied: whether the output layer is the embedding.
        padded_vocab_size: rows of the embedding in Megatron.
    """

    def __init__(
        self,
        tensors: Mapping[str, StoredTensor],
        *,
        model_type: str,
        tied: bool,
        padded_vocab_size: int,
    ) -> None:
        self._tensors = tensors
        self._is_gpt_oss = model_type == "gpt_oss"
        self._padded_vocab_size = padded_vocab_size
        # Name as Bridge has it -> name on disk.
        self._stored = {name: name for name in tensors}
        if not self._is_gpt_oss:
            for name in tensors:
                if match := _FUSED.fullmatch(name):
                    del self._stored[name]
                    self._stored |= dict.fromkeys(self._names_in(match), name)
        if tied:
            self._stored[OUTPUT] = EMBEDDING

    @property
    def source(self) -> "FolderWeights":
        """Bridge asks `state.source` for the names."""
        return self

    def get_all_keys(self) -> list[str]:
        """All names."""
        return sorted(self._stored)

    def stored_name(self, name: str) -> str:
        """The tensor on disk that this one is, or is a part of."""
        return self._stored[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.get_all_keys())

    def __len__(self) -> int:
        return len(self._stored)

    def __contains__(self, name: object) -> bool:
        return name in self._stored

    def __getitem__(self, name: str) -> torch.Tensor:
        stored = self._stored[name]
        if stored != name and (match := _EXPERT.fullmatch(name)):
            return self._read_expert(stored, int(match[2]), match[3])
        tensor = self._read(stored)
        if name in (EMBEDDING, OUTPUT):
            rows = self._padded_vocab_size - tensor.shape[0]
            return torch.nn.functional.pad(tensor, (0, 0, 0, rows))
        if self._is_gpt_oss and name.endswith(".mlp.experts.gate_up_proj"):
            # [E, h, 2f] on disk. Bridge guesses by its shape whether to turn it, and guesses
            # wrong where h = 2f: as [E, 2f, h] it is left as it is.
            return tensor.transpose(1, 2)
        return tensor

    def _names_in(self, match: re.Match[str]) -> list[str]:
        parts = ("gate", "up") if match[2] == "gate_up_proj" else ("down",)
        experts = range(self._tensors[match[0]].shape[0])
        return [f"{match[1]}.{i}.{part}_proj.weight" for i in experts for part in parts]

    def _read_expert(self, stored: str, expert: int, part: str) -> torch.Tensor:
        """One matrix of gate_up_proj [E, 2f, h] or down_proj [E, h, f], as a file has them."""
        tensor = self._tensors[stored]
        with safe_open(tensor.file, framework="pt") as file:
            rows = file.get_slice(stored)
            if part == "down":
                return rows[expert]
            width = tensor.shape[1] // 2
            return rows[expert, :width] if part == "gate" else rows[expert, width:]

    def _read(self, stored: str) -> torch.Tensor:
        with safe_open(self._tensors[stored].file, framework="pt") as file:
            return file.get_tensor(stored)


class FolderModel:
    """What Bridge takes for a pretrained model: its configuration and its weights."""

    def __init__(self, config: Any, state: FolderWeights, name: str) -> None:
        self.config = config
        self.state = state
        self.model_name_or_path = name
