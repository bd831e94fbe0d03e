"""A tiny real HybridModel, whose layers follow a pattern, of this project's local layers."""

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from megatron.core import parallel_state
from megatron.core.models.hybrid.hybrid_layer_allocation import (
    get_hybrid_total_layer_count,
    parse_hybrid_pattern,
)
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_llep.integration.hybrid_spec import build_local_hybrid_spec
from support.training import VOCABULARY, Chunks, Run
from support.weights import fill_parameters, list_parameters

_LAYER = re.compile(r"layers\.(\d+)\.(?!mtp_model_layer|enorm|hnorm|eh_proj|final)")


def hybrid_run(pattern: str, *, as_gpt: bool = False, **run: Any) -> Run:
    """What to train: a model of this pattern, otherwise as `Run`.

    Args:
        pattern: as of --hybrid-layer-pattern.
        as_gpt: with the weights of the GPT model whose layers are "*E"; its names as well.
        run: of `Run`.
    """
    depths = parse_hybrid_pattern(pattern).mtp_num_depths
    config = {
        "num_layers": get_hybrid_total_layer_count(pattern),
        "mtp_num_layers": depths or None,
        "is_hybrid_model": True,
    }
    config |= run.pop("config", {})
    return Run(config=config, build=partial(build_hybrid, pattern, as_gpt), **run)


def name_in_gpt(name: str) -> str:
    """A parameter's name in the GPT model whose layers are "*E"."""
    name = name.replace("decoder.final_norm.", "decoder.final_layernorm.")
    if name.startswith("mtp."):
        return re.sub(r"mtp_model_layer\.layers\.\d+\.", "mtp_model_layer.", name)
    return _LAYER.sub(lambda found: f"layers.{int(found[1]) // 2}.", name, count=1)


def build_hybrid(
    pattern: str,
    as_gpt: bool,
    config: TransformerConfig,
    run: Run,
    transform_spec: Callable[[Any], Any] | None = None,
) -> Chunks:
    """This rank's model chunks, filled: after its first two arguments `Run.build`."""
    chunks: Chunks = []
    for stage in range(run.layout.vpp or 1):
        vp_stage = stage if run.layout.vpp else None
        spec = build_local_hybrid_spec(config)
        if transform_spec is not None:
            spec = transform_spec(spec)
        where = {"ignore_virtual": vp_stage is None, "vp_stage": vp_stage}
        settings: dict[str, Any] = {
            "position_embedding_type": "rope",
            "share_embeddings_and_output_weights": run.tied_embeddings,
        }
        chunk = HybridModel(
            config,
            spec,
            vocab_size=VOCABULARY,
            max_sequence_length=run.sequence_length,
            hybrid_layer_pattern=pattern,
            pre_process=parallel_state.is_pipeline_first_stage(**where),
            post_process=parallel_state.is_pipeline_last_stage(**where),
            vp_stage=vp_stage,
            **(settings | dict(run.model)),
        )
        chunk.model_type = ModelType.encoder_or_decoder
        chunks.append(chunk)
    named = list_parameters(chunks, run.layout)
    fill_parameters(
        [replace(each, name=name_in_gpt(each.name)) for each in named] if as_gpt else named
    )
    return chunks
