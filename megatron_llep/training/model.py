"""The model's configuration from Megatron's arguments, with LLEP switched on where asked."""

from argparse import Namespace
from functools import partial

from megatron_llep.compat import read_flag
from megatron_llep.compat.training import GPTModelConfig, ModelConfig, gpt_config_from_args
from megatron_llep.config import LLEPConfig
from megatron_llep.integration.convert import convert_model
from megatron_llep.integration.hybrid_pattern import read_pattern
from megatron_llep.integration.settings.notices import Notices
from megatron_llep.integration.settings.table import replace_in_loop
from megatron_llep.lending.progress import Progress
from megatron_llep.training.arguments import say_what_runs
from megatron_llep.training.local_model import use_local_layers


def build_model_config(args: Namespace, llep: LLEPConfig, progress: Progress) -> ModelConfig:
    """Megatron's model configuration; its hook converts the MoE layers before DDP wraps them.

    Of a hybrid model where `--hybrid-layer-pattern` is given, else of a GPT model. The layers tell
    `progress` where this rank is.
    """
    what_runs, replaced = say_what_runs(args, llep)
    if read_pattern(args) is None:
        config: ModelConfig = _build_gpt_config(what_runs)
    else:  # of Megatron's modules that are for these alone
        from megatron_llep.training.hybrid import build_hybrid_config

        config = build_hybrid_config(what_runs)
    if read_flag(args, "moe_routing_trace_path"):
        from megatron_llep.training.routing_trace import trace_hook

        config.pre_wrap_hooks.append(trace_hook(args))
    notices = Notices()
    notices.add(replaced)
    if llep.replaces and args.expert_model_parallel_size > 1:
        replace_in_loop(args)
    config.pre_wrap_hooks.append(
        partial(convert_model, config=llep, progress=progress, notices=notices)
    )
    return config


def _build_gpt_config(args: Namespace) -> GPTModelConfig:
    config = gpt_config_from_args(args)
    use_local_layers(config)
    return config
