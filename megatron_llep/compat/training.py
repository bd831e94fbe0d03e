"""`megatron.training`: how a GPT model is described, trained, and given its micro-batches."""

from argparse import Namespace
from collections.abc import Callable
from typing import Any

from megatron.core.enums import ModelType
from megatron.training import pretrain
from megatron.training.argument_utils import pretrain_cfg_container_from_args

from megatron_llep.compat import MEGATRON

if MEGATRON >= (0, 19):
    from megatron.core.utils import flatten_batch_for_packed_sequences as flatten_packs
    from megatron.training.argument_utils import gpt_config_from_args, hybrid_config_from_args
    from megatron.training.models.base import ModelConfig
    from megatron.training.models.gpt import (
        GPTModelBuilder,
        GPTModelConfig,
        default_layer_spec,
    )
    from megatron.training.models.hybrid import HybridModelConfig
    from megatron.training.vocab_utils import calculate_padded_vocab_size
else:
    from megatron_llep.compat.gpt_model import (
        GPTModelConfig,
        default_layer_spec,
        gpt_config_from_args,
        make_provider,
    )
    from megatron_llep.compat.packs import flatten_packs

    ModelConfig = GPTModelConfig

__all__ = [
    "GPTModelBuilder",
    "GPTModelConfig",
    "HybridModelConfig",
    "ModelConfig",
    "build_mtp_of",
    "calculate_padded_vocab_size",
    "default_layer_spec",
    "flatten_packs",
    "gpt_config_from_args",
    "hybrid_config_from_args",
    "train",
]


def build_mtp_of(config: GPTModelConfig, layers: Callable[..., Any], *, builder: str) -> None:
    """Let layers of multi-token prediction be others than Megatron's.

    Args:
        config: of the model.
        layers: makes their specification of the model's settings, its layers and `vp_stage`.
        builder: of models, a class that uses it, in words for import.
    """
    if MEGATRON >= (0, 19):
        # A class variable, which Megatron's configurations also take from what they are read from.
        config.builder = builder
    else:
        config.mtp_layers = layers


def train(
    args: Namespace,
    model: GPTModelConfig,
    build_datasets: Callable[..., Any] | None,
    forward_step: Callable[..., Any],
    **options: Any,
) -> None:
    """Run Megatron's loop on a model that is built as its configuration says.

    Args:
        args: Megatron's, validated.
        model: with hooks for its chunks.
        build_datasets: Megatron's dataset provider.
        forward_step: as Megatron's schedules call it.
        options: more keywords for `megatron.training.pretrain`.
    """
    container = pretrain_cfg_container_from_args(args, model)
    kind = ModelType.encoder_or_decoder
    if MEGATRON >= (0, 19):
        pretrain(container, build_datasets, kind, forward_step, **options)
    else:
        provider = make_provider(args, model)
        pretrain(container, build_datasets, provider, kind, forward_step, **options)
