"""What a training script does with a Hugging Face folder, in forked ranks, up to the first step.

Letters: S tokens, V vocabulary.
"""

import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hf_models import SEQUENCE, make_tokens

from megatron_llep.placement.forward import Planned
from support.llep import EAGER, note_decisions
from support.ranks import run_ranks


@dataclass(frozen=True)
class HFRun:
    """What one rank saw."""

    row: int
    """Of `make_tokens`: the data-parallel rank."""
    logits: torch.Tensor | None
    """[1, S, V]; None under pipeline parallelism."""
    lent: int
    """Experts lent, all layers."""


def run_hf(world_size: int, flags: Sequence[object], *, timeout: float = 60.0) -> list[HFRun]:
    """Load, compute logits and save, as the flags say, with LLEP where there is EP."""
    _import_once()
    return run_ranks(_run, world_size, [str(flag) for flag in flags], timeout=timeout)


def _import_once() -> None:
    """In the parent, so that forked ranks need not."""
    import megatron.training.training  # noqa: F401

    from megatron_llep.device import prepare_megatron_training
    from megatron_llep.training.hf.bridge import import_bridge

    prepare_megatron_training()
    import_bridge()


def train_hf(world_size: int, flags: Sequence[object], *, timeout: float = 90.0) -> list[HFRun]:
    """Train on mock data through Megatron's own `pretrain`, save, and then compute logits."""
    _import_once()
    return run_ranks(_train, world_size, [str(flag) for flag in flags], timeout=timeout)


def _run(rank: int, world_size: int, flags: list[str]) -> HFRun:
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training import training

    from megatron_llep.training.hf.install import install_hf

    args, config = _start([*flags, "--train-iters", "1"])
    training.initialize_megatron()
    save_hf = install_hf(config, args)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    builder = config.get_builder_cls()(config)
    chunks = builder.build_distributed_models(groups, wrap_with_ddp=False)
    result = _look(chunks)
    save_hf()
    return result


def _train(rank: int, world_size: int, flags: list[str]) -> HFRun:
    from megatron.core.enums import ModelType
    from megatron.training import pretrain
    from megatron.training.argument_utils import pretrain_cfg_container_from_args

    from megatron_llep.training.data import build_datasets
    from megatron_llep.training.hf.install import install_hf
    from megatron_llep.training.step import forward_step

    args, config = _start(flags)
    save_hf = install_hf(config, args)
    wrapped: list[torch.nn.Module] = []
    config.post_wrap_hooks.append(lambda chunks: wrapped.extend(chunks) or chunks)
    pretrain(
        pretrain_cfg_container_from_args(args, config),
        build_datasets,
        ModelType.encoder_or_decoder,
        forward_step,
    )
    save_hf()
    return _look(wrapped)


def _start(flags: list[str]) -> tuple[Namespace, Any]:
    """Arguments and the model's configuration, as a script makes them."""
    from megatron.training.arguments import parse_and_validate_args

    from megatron_llep.config import LLEPConfig
    from megatron_llep.lending.progress import Progress
    from megatron_llep.training.cpu_flags import flags_without_gpu
    from megatron_llep.training.hf.arguments import add_hf_arguments, check_hf_arguments
    from megatron_llep.training.hf.flags import flags_from_hf
    from megatron_llep.training.model import build_model_config

    argv = [*flags, "--micro-batch-size", "1", "--seq-length", str(SEQUENCE), "--mock-data"]
    argv += ["--tokenizer-type", "NullTokenizer", "--vocab-size", "90", "--lr", "1e-2"]
    argv += ["--eval-iters", "0", "--eval-interval", "1", "--lr-decay-style", "constant"]
    argv += ["--moe-token-dispatcher-type", "alltoall"]
    argv += flags_from_hf(argv)
    sys.argv = ["script", *argv, *flags_without_gpu(argv)]
    args = parse_and_validate_args(add_hf_arguments)
    check_hf_arguments(args)
    llep = EAGER if args.expert_model_parallel_size > 1 else LLEPConfig(enabled=False)
    return args, build_model_config(args, llep, Progress())


@torch.no_grad()
def _look(chunks: list[torch.nn.Module]) -> HFRun:
    from megatron.core import parallel_state

    row = parallel_state.get_data_parallel_rank()
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        return HFRun(row, None, 0)
    decisions: list[Planned] = []
    note_decisions(chunks, decisions)
    positions = torch.arange(SEQUENCE)
    mask = positions[None, :] > positions[:, None]  # True where attention is not
    model = chunks[0].eval()
    logits = model(make_tokens(row), positions[None], mask[None, None], runtime_gather_output=True)
    return HFRun(row, logits, sum(len(decision.plan.transfers) for decision in decisions))
