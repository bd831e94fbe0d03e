"""A layer specification for `--spec`, for scripts that cannot be changed.

torchrun pretrain_gpt.py ... --spec megatron_llep.integration.spec gpt_layers_with_llep
"""

from argparse import Namespace
from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training import get_args

from megatron_llep.compat.training import GPTModelConfig, default_layer_spec
from megatron_llep.config import LLEPConfig
from megatron_llep.integration.arguments import llep_config_from_args
from megatron_llep.integration.convert import with_llep
from megatron_llep.integration.local_spec import build_local_block_spec


def gpt_layers_with_llep(
    config: GPTModelConfig | TransformerConfig | Namespace,
    *more: Any,
    vp_stage: int | None = None,
) -> TransformerBlockSubmodules:
    """Megatron's own layers for this model, with LLEP in their MoE layers.

    The settings come from the `--moe-llep-*` flags where the script knows them, else they are
    LLEPConfig's defaults. Layers that Megatron specifies by itself (multi-token prediction) stay
    plain: use `convert_model` for these.

    Called as `(config, vp_stage=None)`, as Megatron does, or as `(args, config, vp_stage)`, as
    slime does.

    Args:
        config: of the model; or the script's parsed arguments.
        more: what follows by position: the stage; or the configuration and the stage.
        vp_stage: the virtual pipeline stage, given by name.

    Raises:
        ValueError: as `with_llep` and, without Transformer Engine, `build_local_block_spec`;
            there also multi-token prediction with multi-latent attention.
    """
    given = [config, *more]
    args = given.pop(0) if isinstance(config, Namespace) else get_args()
    model, vp_stage = given if len(given) > 1 else (given[0], vp_stage)
    llep = llep_config_from_args(args) if hasattr(args, "moe_llep") else LLEPConfig()
    return with_llep(build_plain_layers(model, vp_stage), llep)


def build_plain_layers(
    config: GPTModelConfig | TransformerConfig, vp_stage: int | None
) -> TransformerBlockSubmodules:
    """Megatron's own layers for a model; without Transformer Engine those of this package.

    Raises:
        ValueError: as `build_local_block_spec`.
    """
    transformer = getattr(config, "transformer", config)
    if transformer.transformer_impl == "local":
        if transformer.multi_latent_attention and transformer.mtp_num_layers:
            raise ValueError(
                f"--mtp-num-layers {transformer.mtp_num_layers}: with --spec Megatron makes these "
                "layers by itself, and without Transformer Engine not of "
                "--multi-latent-attention; leave it out, or --spec with pretrain/pretrain_gpt.py"
            )
        return build_local_block_spec(transformer, vp_stage)
    if isinstance(config, GPTModelConfig):
        return default_layer_spec(config, vp_stage)
    return get_gpt_decoder_block_spec(
        transformer,
        use_transformer_engine=True,
        normalization=transformer.normalization,
        qk_l2_norm=transformer.qk_l2_norm,
        vp_stage=vp_stage,
    )
