"""Lets a GPT model be built of local layers, those of multi-token prediction too.

Megatron's builder takes the specification of the layers from the model's configuration, and makes
that of multi-token prediction by itself.
"""

from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from megatron_llep.compat.training import GPTModelConfig, build_mtp_of
from megatron_llep.integration.local_latent_attention import check_latent_attention
from megatron_llep.integration.local_spec import build_local_block_spec, build_local_mtp_spec

_BUILDER = "megatron_llep.training.local_builder.LocalGPTModelBuilder"


def use_local_layers(config: GPTModelConfig) -> None:
    """Let a model's configuration build our local layers, unless it has a specification.

    Raises:
        ValueError: as `check_latent_attention`; before any process group exists.
    """
    transformer = config.transformer
    if config.transformer_layer_spec is not None or transformer.transformer_impl != "local":
        return
    if transformer.multi_latent_attention:
        check_latent_attention(transformer)
    config.transformer_layer_spec = _local_layers
    if transformer.mtp_num_layers:
        build_mtp_of(config, build_local_mtp_spec, builder=_BUILDER)


def _local_layers(
    config: GPTModelConfig, vp_stage: int | None = None
) -> TransformerBlockSubmodules:
    return build_local_block_spec(config.transformer, vp_stage)
