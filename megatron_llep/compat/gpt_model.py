"""Megatron 0.18: a GPT model's configuration with hooks, which Megatron has from 0.19 on."""

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_decoder_layer_specs,
    get_gpt_mtp_block_spec,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import ModuleSpec, import_module
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training.argument_utils import core_transformer_config_from_args

Chunks = list[torch.nn.Module]
type Layers = ModuleSpec | TransformerBlockSubmodules


@dataclass(kw_only=True)
class GPTModelConfig:
    """What is read and set of Megatron 0.19's."""

    transformer: TransformerConfig
    transformer_layer_spec: Layers | Callable[..., Layers] | None = None
    pre_wrap_hooks: list[Callable[[Chunks], Chunks]] = field(default_factory=list)
    """Called with all chunks before DDP wraps them; they change them in place."""
    mtp_layers: Callable[..., Any] | None = None
    """Makes the specification of multi-token prediction of settings, layers and `vp_stage`."""
    post_wrap_hooks: list[Callable[[Chunks], Chunks]] = field(default_factory=list)
    """There is no place to call them."""


def gpt_config_from_args(args: Namespace) -> GPTModelConfig:
    """As Megatron 0.19's.

    Raises:
        ValueError: `--yaml-cfg`.
    """
    if args.yaml_cfg is not None:
        raise ValueError(f"--yaml-cfg {args.yaml_cfg}: give flags, or install megatron-core 0.19")
    return GPTModelConfig(
        transformer=core_transformer_config_from_args(args),
        transformer_layer_spec=None if args.spec is None else import_module(args.spec),
    )


def default_layer_spec(config: GPTModelConfig, vp_stage: int | None) -> TransformerBlockSubmodules:
    """Megatron's own layers of this stage, dense or of experts."""
    transformer = config.transformer
    return get_gpt_decoder_block_spec(
        transformer,
        use_transformer_engine=transformer.transformer_impl == "transformer_engine",
        normalization=transformer.normalization,
        qk_l2_norm=transformer.qk_l2_norm,
        vp_stage=vp_stage,
    )


def make_provider(args: Namespace, config: GPTModelConfig) -> Callable[..., GPTModel]:
    """A model provider for Megatron's loop, which asks it for one chunk after another.

    The hooks run when the last one of this rank is built.
    """
    assert not config.post_wrap_hooks, "refused with the arguments"
    chunks: Chunks = []
    num_chunks = config.transformer.virtual_pipeline_model_parallel_size or 1

    def provide(
        *,
        pre_process: bool,
        post_process: bool,
        pg_collection: ProcessGroupCollection,
        vp_stage: int | None = None,
        config: TransformerConfig | None = None,
    ) -> GPTModel:
        assert config is None, "of a second model, for the rollouts of Megatron-LM's own RL"
        model = _build_chunk(args, settings, pre_process, post_process, pg_collection, vp_stage)
        chunks.append(model)
        if len(chunks) == num_chunks:
            for hook in settings.pre_wrap_hooks:
                hook(chunks)
            chunks.clear()
        return model

    settings = config
    return provide


def _build_chunk(
    args: Namespace,
    config: GPTModelConfig,
    pre_process: bool,
    post_process: bool,
    pg_collection: ProcessGroupCollection,
    vp_stage: int | None,
) -> GPTModel:
    layers: Any = config.transformer_layer_spec
    if layers is None:
        layers = default_layer_spec(config, vp_stage)
    elif callable(layers) and not isinstance(layers, ModuleSpec):
        layers = layers(config, vp_stage=vp_stage)
    if config.mtp_layers is None:
        mtp = _build_mtp_spec(config.transformer, vp_stage)
    else:
        mtp = config.mtp_layers(config.transformer, layers, vp_stage)
    return GPTModel(
        config=config.transformer,
        transformer_layer_spec=layers,
        mtp_block_spec=mtp,
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        fp16_lm_cross_entropy=args.fp16_lm_cross_entropy,
        parallel_output=True,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_percent=args.rotary_percent,
        rotary_base=args.rotary_base,
        rope_scaling=args.use_rope_scaling,
        seq_len_interpolation_factor=args.rotary_seq_len_interpolation_factor,
        pg_collection=pg_collection,
        vp_stage=vp_stage,
    )


def _build_mtp_spec(transformer: TransformerConfig, vp_stage: int | None) -> Any:
    """Of the last layer's kind, also where this stage has no layer."""
    if transformer.mtp_num_layers is None:
        return None
    use_te = transformer.transformer_impl == "transformer_engine"
    layers = get_gpt_decoder_layer_specs(
        transformer,
        use_transformer_engine=use_te,
        normalization=transformer.normalization,
        qk_l2_norm=transformer.qk_l2_norm,
        vp_stage=vp_stage,
    )
    return get_gpt_mtp_block_spec(
        transformer, layers[-1], use_transformer_engine=use_te, vp_stage=vp_stage
    )
