"""A Megatron model as a Hugging Face folder: weights, `config.json` and tokenizer."""

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.utils import unwrap_model
from megatron.training.utils import print_rank_0

from megatron_llep.training.hf.bridge import local_tasks, open_bridge
from megatron_llep.training.hf.config_file import HFConfig, read_config
from megatron_llep.training.hf.shard_writer import ShardWriter
from megatron_llep.training.hf.source import EMBEDDING, OUTPUT

_COPIED = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.tiktoken",
    "chat_template*",
    "additional_chat_templates/*",
)
_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def save_hf(
    chunks: Sequence[torch.nn.Module],
    folder: Path,
    source: Path,
    *,
    tokenizer: Path | None = None,
) -> None:
    """Write the model so that transformers loads it; all ranks call it.

    Weights keep the precision in which they are trained. No rank holds more than one file's worth
    of them (and one layer's experts, where those are one tensor).

    Args:
        chunks: this rank's model chunks, wrapped or not, of any layout, with or without LLEP.
        folder: new or empty; rank 0 writes it.
        source: the Hugging Face folder whose `config.json` describes the model.
        tokenizer: the folder whose tokenizer is copied. Default: `source`.

    Raises:
        OSError: on all ranks, if rank 0 could not write.
        ValueError: on all ranks, if a parameter has no counterpart in the Hugging Face model.
    """
    _finish_gathering(chunks)
    models = unwrap_model(list(chunks))
    bridge, transformers_config = open_bridge(source)
    config = read_config("--hf-load", source)
    local_tasks(bridge.build_conversion_tasks(transformers_config, models), models)
    weights = bridge.stream_weights_megatron_to_hf(
        models, transformers_config, cpu=True, show_progress=False, merge_adapter_weights=False
    )
    is_writer = dist.get_rank() == 0
    writer = ShardWriter(folder)
    error: OSError | None = None
    for name, tensor in _trim(weights, config, _mtp_layers(config, models)):
        # All ranks take part in gathering every tensor, also after rank 0 has failed.
        if is_writer and error is None:
            error = _attempt(writer.add, name, tensor)
    if is_writer and error is None:
        error = _attempt(writer.finish)
    if is_writer and error is None:
        error = _attempt(_write_rest, folder, config, source, tokenizer or source, models)
    failure = [None if error is None else str(error)]
    dist.broadcast_object_list(failure, src=0)
    if failure[0] is not None:
        raise OSError(f"--hf-save {folder}: {failure[0]}; the folder is not complete")
    print_rank_0(f"wrote {folder}")


def _finish_gathering(chunks: Sequence[torch.nn.Module]) -> None:
    """With --overlap-param-gather the latest parameters may still be on other ranks."""
    for chunk in chunks:
        if isinstance(chunk, DistributedDataParallel) and chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)


def _trim(
    weights: Iterator[tuple[str, torch.Tensor]], config: HFConfig, mtp_layers: Sequence[int]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Leave out padded rows, and the output layer where it is the embedding.

    DeepSeek's layers of multi-token prediction have copies of both; `mtp_layers` are their numbers.
    """
    rows = config.require("vocab_size")
    tied = config.get("tie_word_embeddings", default=False)
    copies = {EMBEDDING: "embed_tokens.weight", OUTPUT: "shared_head.head.weight"}
    for name, tensor in weights:
        if name in copies:
            tensor = tensor[:rows]
            for layer in mtp_layers:
                yield f"model.layers.{layer}.{copies[name]}", tensor.clone()
        if name == OUTPUT and tied:
            continue
        yield name, tensor


def _mtp_layers(config: HFConfig, models: Sequence[torch.nn.Module]) -> Sequence[int]:
    """Their numbers in the folder: they come after the others."""
    first = config.require("num_hidden_layers")
    return range(first, first + (getattr(models[0].config, "mtp_num_layers", None) or 0))


def _attempt(function: Any, *args: Any) -> OSError | None:
    try:
        function(*args)
    except OSError as error:
        return error
    return None


def _write_rest(
    folder: Path,
    config: HFConfig,
    source: Path,
    tokenizer: Path,
    models: Sequence[torch.nn.Module],
) -> None:
    dtype = _DTYPES[models[0].config.params_dtype]
    text = json.dumps(_saved_config(config, dtype, models), indent=2) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")
    for origin in dict.fromkeys((tokenizer, source)):  # the tokenizer's files first
        for pattern in _COPIED:
            for path in sorted(origin.glob(pattern)):
                target = folder / path.relative_to(origin)
                if path.is_file() and not target.exists():
                    target.parent.mkdir(exist_ok=True)
                    shutil.copyfile(path, target)


def _saved_config(config: HFConfig, dtype: str, models: Sequence[torch.nn.Module]) -> dict:
    values = dict(config.values)
    values["dtype" if "dtype" in values else "torch_dtype"] = dtype
    # What is written is not quantized, whatever was read.
    values.pop("quantization_config", None)
    if "num_nextn_predict_layers" in values:
        values["num_nextn_predict_layers"] = len(_mtp_layers(config, models))
    return values
