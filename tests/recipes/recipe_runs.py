"""Train a shrunk recipe: its flags through Megatron's parser, into Megatron's own settings."""

import contextlib
import dataclasses
import io
import os
import sys
import warnings
from functools import partial
from typing import Any
from unittest import mock

from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training.argument_utils import (
    core_transformer_config_from_args,
    gpt_config_from_args,
    hybrid_config_from_args,
)
from megatron.training.arguments import parse_args, validate_args
from megatron.training.training import get_megatron_ddp_config, get_megatron_optimizer_config
from shrink import read_layout

from megatron_llep.integration.arguments import add_llep_arguments
from megatron_llep.offline.launch.flags import Flags, format_flags
from support.context import forward_part, with_gathering_attention
from support.hybrid import build_hybrid
from support.training import VOCABULARY, Run


def make_run(flags: Flags) -> Run:
    """What these flags train, but for data and learning-rate schedule."""
    layout = read_layout(flags)
    args = _validate(flags, layout.world_size)
    model: Any
    if args.hybrid_layer_pattern is None:
        model, build = gpt_config_from_args(args), None
    else:
        model = hybrid_config_from_args(args)
        build = partial(build_hybrid, args.hybrid_layer_pattern, False)
    optimizer, _ = get_megatron_optimizer_config(args)
    context: dict[str, Any] = {}
    if layout.cp > 1:
        context = {"spec": with_gathering_attention, "forward_step": forward_part}
    return Run(
        layout=layout,
        steps=args.train_iters,
        micro_batches=args.global_batch_size // args.micro_batch_size,
        micro_batch_size=args.micro_batch_size,
        sequence_length=args.seq_length,
        build_config=partial(build_config, args),
        build=build,
        model={
            "position_embedding_type": model.position_embedding_type,
            "rotary_percent": model.rotary_percent,
            "rotary_base": model.rotary_base,
            "share_embeddings_and_output_weights": model.share_embeddings_and_output_weights,
        },
        ddp=_list_fields(get_megatron_ddp_config(args)),
        optimizer=_list_fields(optimizer),
        align_grad_reduce=args.align_grad_reduce,
        **context,
    )


def build_config(args: Any) -> TransformerConfig:
    """The model's configuration, anew for each run, as training sets functions in it."""
    return core_transformer_config_from_args(args)


def _validate(flags: Flags, world_size: int) -> Any:
    """Megatron's arguments, as training scripts have them."""
    assert flags["--vocab-size"] == VOCABULARY - 1
    with (
        mock.patch.object(sys, "argv", ["train", *format_flags(flags)]),
        mock.patch.dict(os.environ, WORLD_SIZE=str(world_size), RANK="0"),
        contextlib.redirect_stdout(io.StringIO()),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        args = parse_args(add_llep_arguments)
        validate_args(args)
    return args


def _list_fields(settings: Any) -> dict[str, Any]:
    return {
        field.name: getattr(settings, field.name)
        for field in dataclasses.fields(settings)
        if field.init
    }
