"""The `*.safetensors` of a Hugging Face folder: which tensor is where, read from their headers.

Says what is wrong with a folder (a shard that is missing or cut off, layers that do not match)
before anything is built, and without torch.
"""

import json
import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_llep.training.hf.config_file import HFConfig
from megatron_llep.training.hf.shape import Shape

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_LENGTH = struct.Struct("<Q")
_MAX_HEADER = 100 * 2**20  # safetensors' own limit
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies, and its shape."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    """As safetensors names it, such as BF16."""


def list_tensors(flag: str, folder: Path) -> dict[str, StoredTensor]:
    """Name -> tensor, of all files, each of which is there, whole, and holds what the index says.

    Raises:
        ValueError: names the flag, the file and the way out.
    """
    index = folder / INDEX
    if index.is_file():
        return _read_sharded(flag, folder, index)
    if (folder / SINGLE).is_file():
        return _read_header(flag, folder / SINGLE)
    if any(folder.glob("*.bin")) or any(folder.glob("*.safetensors")):
        raise ValueError(
            f"{flag} {folder}: the folder has neither {INDEX} nor {SINGLE}; load it with "
            "transformers and write it again with save_pretrained"
        )
    raise ValueError(f"{flag} {folder}: the folder has no weights (*.safetensors)")


def _read_sharded(flag: str, folder: Path, index: Path) -> dict[str, StoredTensor]:
    try:
        file_of = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{flag} {folder}: {index} is no index of shards") from error
    missing = sorted({name for name in file_of.values() if not (folder / name).is_file()})
    if missing:
        raise ValueError(
            f"{flag} {folder}: {len(missing)} of {len(set(file_of.values()))} shards that "
            f"{INDEX} names are missing, the first is {missing[0]}; download the folder again"
        )
    tensors: dict[str, StoredTensor] = {}
    for name in sorted(set(file_of.values())):
        tensors |= _read_header(flag, folder / name)
    for tensor, name in file_of.items():
        if tensor not in tensors or tensors[tensor].file.name != Path(name).name:
            raise ValueError(
                f"{flag} {folder}: {name} has no tensor {tensor}, which {INDEX} says it has; "
                "download the folder again"
            )
    return tensors


def _read_header(flag: str, path: Path) -> dict[str, StoredTensor]:
    """One file: eight bytes of length, a JSON object, then the data."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(_LENGTH.size)
        length = _LENGTH.unpack(start)[0] if len(start) == _LENGTH.size else _MAX_HEADER + 1
        text = file.read(length) if length <= _MAX_HEADER else b""
    try:
        header: Mapping[str, dict] = json.loads(text)
        tensors = {
            name: StoredTensor(path, tuple(entry["shape"]), entry["dtype"])
            for name, entry in header.items()
            if name != "__metadata__"
        }
        ends = [header[name]["data_offsets"][1] for name in tensors]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{flag}: {path} is not a safetensors file ({size} bytes; of a git clone without git "
            "lfs it would be a pointer); download it again"
        ) from error
    expected = _LENGTH.size + length + max(ends, default=0)
    if size < expected:
        raise ValueError(
            f"{flag}: {path} is cut off, it has {size} of {expected} bytes; download it again"
        )
    return tensors


def check_against_config(
    flag: str,
    folder: Path,
    tensors: Mapping[str, StoredTensor],
    config: HFConfig,
    shape: Shape,
) -> None:
    """Refuse weights of another size than `config.json` describes.

    Raises:
        ValueError: names the flag, both values and the way out.
    """
    layers = config.require("num_hidden_layers")
    # Layers after those are of multi-token prediction.
    extra = config.get("num_nextn_predict_layers", default=0)
    found = {int(match[1]) for name in tensors if (match := _LAYER.match(name))}
    missing = sorted(set(range(layers)) - found)
    if missing:
        raise ValueError(
            f"{flag} {folder}: config.json has num_hidden_layers {layers}, and the weights have "
            f"no layer {missing[0]}; take config.json and weights from one model"
        )
    if max(found) >= layers + extra:
        raise ValueError(
            f"{flag} {folder}: config.json has num_hidden_layers {layers}, and the weights have "
            f"layers up to {max(found)}; take config.json and weights from one model"
        )
    embedding = tensors.get("model.embed_tokens.weight")
    if embedding is None:
        raise ValueError(
            f"{flag} {folder}: the weights have no model.embed_tokens.weight; only causal "
            "language models that transformers wrote are known"
        )
    sizes = _sizes(config, shape)
    for name, tensor in tensors.items():
        for pattern, size in sizes.items():
            if re.fullmatch(pattern, name) and math.prod(tensor.shape) != math.prod(size):
                raise ValueError(
                    f"{flag} {folder}: by config.json {name} has the size {size}, and it is "
                    f"{tensor.shape} in {tensor.file.name}; take both from one model"
                )


def _sizes(config: HFConfig, shape: Shape) -> dict[str, tuple[int, ...]]:
    """Pattern of names -> size, in any order, of the tensors that tell most shapes apart."""
    hidden = config.require("hidden_size")
    experts = int(shape.flags["--num-experts"])
    width = int(shape.flags["--moe-ffn-hidden-size"])
    layer = r"model\.layers\.\d+\."
    sizes: dict[str, tuple[int, ...]] = {
        r"(model\.embed_tokens|lm_head)\.weight": (shape.vocab_size, hidden),
        layer + r"mlp\.(gate|router)\.weight": (experts, hidden),
        layer + r"mlp\.experts\.gate_up_proj": (experts, 2 * width, hidden),
        layer + r"mlp\.experts\.down_proj": (experts, hidden, width),
        layer + r"mlp\.experts\.\d+\.(gate|up|down)_proj\.weight": (width, hidden),
    }
    if "--kv-channels" in shape.flags:
        channels = int(shape.flags["--kv-channels"])
        queries = int(shape.flags["--num-attention-heads"]) * channels
        keys = int(shape.flags["--num-query-groups"]) * channels
        sizes[layer + r"self_attn\.[qo]_proj\.weight"] = (queries, hidden)
        sizes[layer + r"self_attn\.[kv]_proj\.weight"] = (keys, hidden)
    return sizes
