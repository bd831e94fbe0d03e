"""The model's configuration from Megatron's arguments, with LLEP switched on where asked."""

from argparse import Namespace
from functools import partial

from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from megatron_llep.compat.training import GPTModelConfig, gpt_config_from_args
from megatron_llep.config import LLEPConfig
from megatron_llep.integration.convert import convert_model
from megatron_llep.integration.local_spec import build_local_block_spec
from megatron_llep.integration.settings.notices import Notices
from megatron_llep.integration.settings.table import replace_in_loop
from megatron_llep.lending.progress import Progress
from megatron_llep.training.arguments import say_what_runs


def build_model_config(args: Namespace, llep: LLEPConfig, progress: Progress) -> GPTModelConfig:
    """Megatron's model configuration; its hook converts the MoE layers before DDP wraps them.

    The layers tell `progress` where this rank is.
    """
    what_runs, replaced = say_what_runs(args, llep)
    config = gpt_config_from_args(what_runs)
    if config.transformer_layer_spec is None and config.transformer.transformer_impl == "local":
        config.transformer_layer_spec = _local_layers
    notices = Notices()
    notices.add(replaced)
    if llep.enabled and args.expert_model_parallel_size > 1:
        replace_in_loop(args)
    config.pre_wrap_hooks.append(
        partial(convert_model, config=llep, progress=progress, notices=notices)
    )
    return config


def _local_layers(
    config: GPTModelConfig, vp_stage: int | None = None
) -> TransformerBlockSubmodules:
    return build_local_block_spec(config.transformer, vp_stage)
