"""A layer specification for Megatron's `--spec`, for scripts that cannot be changed.

torchrun pretrain_gpt.py ... --spec megatron_llep.integration.spec gpt_layers_with_llep
"""

from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.training import get_args
from megatron.training.models.gpt import GPTModelConfig, default_layer_spec

from megatron_llep.config import LLEPConfig
from megatron_llep.integration.arguments import llep_config_from_args
from megatron_llep.integration.convert import with_llep
from megatron_llep.integration.local_spec import build_local_block_spec


def gpt_layers_with_llep(
    config: GPTModelConfig, vp_stage: int | None = None
) -> TransformerBlockSubmodules:
    """Megatron's own layers for this model, with LLEP in their MoE layers.

    The settings come from the `--moe-llep-*` flags where the script knows them, else they are
    LLEPConfig's defaults. Layers that Megatron specifies by itself (multi-token prediction) stay
    plain: use `convert_model` for these.
    """
    args = get_args()
    llep = llep_config_from_args(args) if hasattr(args, "moe_llep") else LLEPConfig()
    if config.transformer.transformer_impl == "local":
        layers = build_local_block_spec(config.transformer, vp_stage)
    else:
        layers = default_layer_spec(config, vp_stage)
    return with_llep(layers, llep)
