"""A tiny MoE model in Megatron-Bridge's own `pretrain`, on a CPU, with this project's layers."""

import contextlib
import importlib.util
import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

if importlib.util.find_spec("hydra") is None:
    pytest.skip("needs Megatron-Bridge's training: make test-frameworks", allow_module_level=True)

from framework_stubs import install_stubs

install_stubs()

import megatron.bridge.training.initialize as bridge_initialize  # noqa: E402
import megatron.bridge.training.setup as bridge_setup  # noqa: E402
from megatron.bridge.models.gpt_provider import GPTModelProvider  # noqa: E402
from megatron.bridge.training.config import (  # noqa: E402
    CheckpointConfig,
    ConfigContainer,
    DistributedDataParallelConfig,
    LoggerConfig,
    MockGPTDatasetConfig,
    OptimizerConfig,
    RNGConfig,
    SchedulerConfig,
    TokenizerConfig,
    TrainingConfig,
    ValidationConfig,
)
from megatron.bridge.training.gpt_step import forward_step  # noqa: E402
from megatron.bridge.training.pretrain import pretrain  # noqa: E402
from tiny_models import FLOAT32, LAYERS  # noqa: E402

from support.routing import Routing, force_routing  # noqa: E402

STEPS = 3
SEQUENCE = 32


@dataclass(frozen=True)
class BridgeRun:
    """What one rank saw of a training."""

    losses: list[float]
    lent: float
    printed: str
    logged: dict[str, list[float]]
    """Of TensorBoard, by name; on the last rank."""


def make_provider(**changes: Any) -> GPTModelProvider:
    settings: dict[str, Any] = {
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "ffn_hidden_size": 64,
        "num_moe_experts": 8,
        "moe_ffn_hidden_size": 64,
        "moe_router_topk": 2,
        "moe_router_load_balancing_type": "aux_loss",
        "moe_aux_loss_coeff": 1e-3,
        "moe_token_dispatcher_type": "alltoall",
        "expert_model_parallel_size": 2,
        "normalization": "RMSNorm",
        "activation_func": torch.nn.functional.silu,
        "gated_linear_unit": True,
        "add_bias_linear": False,
        "position_embedding_type": "rope",
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "seq_length": SEQUENCE,
        "vocab_size": 64,
    }
    return GPTModelProvider(**(LAYERS | FLOAT32 | settings | changes))


def make_config(folder: Path, model: Any, **changes: Any) -> ConfigContainer:
    """A recipe for a few steps."""
    parts: dict[str, Any] = {
        "model": model,
        "train": TrainingConfig(train_iters=STEPS, global_batch_size=4, micro_batch_size=1),
        "validation": ValidationConfig(eval_interval=STEPS, eval_iters=1),
        "optimizer": OptimizerConfig(
            optimizer="adam", lr=1e-2, min_lr=1e-2, use_distributed_optimizer=True, clip_grad=1.0
        ),
        "scheduler": SchedulerConfig(
            lr_decay_style="constant",
            lr_warmup_iters=0,
            start_weight_decay=0.0,
            end_weight_decay=0.0,
            weight_decay_incr_style="constant",
        ),
        "ddp": DistributedDataParallelConfig(
            use_distributed_optimizer=True, overlap_grad_reduce=True, grad_reduce_in_fp32=True
        ),
        "dataset": MockGPTDatasetConfig(
            random_seed=1,
            reset_attention_mask=False,
            reset_position_ids=False,
            eod_mask_loss=False,
            seq_length=SEQUENCE,
            num_dataset_builder_threads=1,
            dataloader_type="single",
            num_workers=0,
        ),
        "logger": LoggerConfig(log_interval=1, tensorboard_dir=str(folder / "tensorboard")),
        "tokenizer": TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=63),
        "checkpoint": CheckpointConfig(save=None, load=None, ckpt_format="torch_dist"),
        "rng": RNGConfig(seed=1),
    }
    return ConfigContainer(**(parts | changes))


class _Losses:
    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_step_end(self, context: Any) -> None:
        loss = context.loss_dict["lm loss"].flatten()
        self.seen.append(float(loss[0] / loss[1]) if len(loss) == 2 else float(loss[0]))


def skew(chunks: list[torch.nn.Module]) -> list[torch.nn.Module]:
    """Nearly all tokens want one expert."""
    force_routing(chunks, Routing("hot"))
    return chunks


def run_bridge(
    config: ConfigContainer, start: Callable[[Callable[..., None], ConfigContainer, Any], None]
) -> BridgeRun:
    """Train in this rank.

    Args:
        config: of the training.
        start: calls `pretrain`, its first argument, with the others; as a script does.
    """
    bridge_setup.initialize_megatron = partial(
        bridge_initialize.initialize_megatron, allow_no_cuda=True
    )
    bridge_initialize.compile_helpers = lambda: None  # the wheel has them, and no Makefile
    if hasattr(config.model, "pre_wrap_hooks"):
        config.model.pre_wrap_hooks.append(skew)
    else:
        config.model.register_pre_wrap_hook(skew)
    losses = _Losses()

    def pretrain_and_look(config: Any, step: Any, callbacks: Any = ()) -> None:
        pretrain(config, step, callbacks=[*callbacks, losses])

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        start(pretrain_and_look, config, forward_step)
    logged = read_tensorboard(Path(config.logger.tensorboard_dir))
    lent = sum(logged.get("moe/llep/lent_experts", [0.0]))
    return BridgeRun(losses.seen, lent, printed.getvalue(), logged)


def read_tensorboard(folder: Path) -> dict[str, list[float]]:
    """Values by name; all steps."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    if not folder.exists():
        return {}
    events = EventAccumulator(str(folder)).Reload()
    return {
        name: [event.value for event in events.Scalars(name)] for name in events.Tags()["scalars"]
    }
