"""verl's own MegatronEngine, as its TrainingWorker drives it, on a CPU."""

import importlib.util
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

if importlib.util.find_spec("verl") is None:
    pytest.skip("needs verl: make test-frameworks", allow_module_level=True)

from framework_stubs import install_stubs

install_stubs()

from tiny_models import LAYERS, VOCABULARY  # noqa: E402
from verl.trainer.config import CheckpointConfig  # noqa: E402
from verl.utils import tensordict_utils as tu  # noqa: E402
from verl.utils.dataset.dataset_utils import DatasetPadMode  # noqa: E402
from verl.workers.config import (  # noqa: E402
    HFModelConfig,
    McoreEngineConfig,
    McoreOptimizerConfig,
    TrainingWorkerConfig,
)
from verl.workers.engine import EngineRegistry  # noqa: E402
from verl.workers.engine.megatron.transformer_impl import MegatronEngineWithLMHead  # noqa: E402
from verl.workers.utils.losses import sft_loss  # noqa: E402

from support.routing import Routing, force_routing  # noqa: E402

STEPS = 3
LENGTHS = (13, 24, 9, 18)
"""Of the sequences of a data-parallel rank."""


@dataclass(frozen=True)
class VerlRun:
    """What one rank saw."""

    losses: list[float]
    metrics: list[dict[str, Any]]
    weights: dict[str, torch.Tensor]
    """As verl sends them to the rollout engine."""


def make_config(
    folder: Path, external_lib: str, overrides: dict[str, Any], **engine: Any
) -> TrainingWorkerConfig:
    settings = {
        "expert_model_parallel_size": 2,
        "expert_tensor_parallel_size": 1,
        "use_dynamic_bsz": False,
        "micro_batch_size_per_gpu": 2,
        "infer_micro_batch_size_per_gpu": 2,
        "override_transformer_config": LAYERS | overrides,
    }
    model = HFModelConfig(
        path=str(folder),
        external_lib=external_lib,
        load_tokenizer=False,
        override_config={"attn_implementation": "eager"},
    )
    model.tokenizer = SimpleNamespace(pad_token_id=0)
    return TrainingWorkerConfig(
        model_type="language_model",
        model_config=model,
        engine_config=McoreEngineConfig(**(settings | engine)),
        optimizer_config=McoreOptimizerConfig(lr=1e-2, lr_decay_steps=10, lr_warmup_steps=0),
        checkpoint_config=CheckpointConfig(),
    )


def make_batch(rank: int, step: int) -> Any:
    """The sequences of one data-parallel rank."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    rows = [torch.randint(VOCABULARY, (length,), generator=generator) for length in LENGTHS]

    def nest(tensors: list[torch.Tensor]) -> torch.Tensor:
        return torch.nested.as_nested_tensor(tensors, layout=torch.jagged)

    return tu.get_tensordict(
        {
            "input_ids": nest(rows),
            "loss_mask": nest([torch.ones_like(row) for row in rows]),
            "position_ids": nest([torch.arange(len(row)) for row in rows]),
        },
        non_tensor_dict={
            "temperature": 1.0,
            "use_dynamic_bsz": False,
            "micro_batch_size_per_gpu": 2,
            "use_remove_padding": True,
            "use_fused_kernels": False,
            "calculate_entropy": False,
            "pad_mode": DatasetPadMode.NO_PADDING,
            "global_token_num": [sum(LENGTHS)],
        },
    )


def start_engine(config: TrainingWorkerConfig, kind: type | None = None) -> Any:
    """The engine that verl's registry gives, or one of another class."""
    settings = {
        "model_config": config.model_config,
        "engine_config": config.engine_config,
        "optimizer_config": config.optimizer_config,
        "checkpoint_config": config.checkpoint_config,
    }
    if kind is not None:
        engine = kind(**settings)
    else:
        engine = EngineRegistry.new(config.model_type, "megatron", **settings)
    engine.initialize()
    return engine


def run_engine(engine: Any, rank: int, steps: int = STEPS) -> VerlRun:
    """Train and export."""
    force_routing(engine.module, Routing("hot"))
    loss = partial(sft_loss, config=None)
    losses, metrics = [], []
    for step in range(steps):
        with engine.train_mode():
            output = engine.train_batch(make_batch(engine.get_data_parallel_rank(), step), loss)
        losses.append(float(torch.tensor(output["loss"]).sum()))
        metrics.append(output["metrics"])
    return VerlRun(losses, metrics, export(engine))


def export(engine: Any) -> dict[str, torch.Tensor]:
    weights, _ = engine.get_per_tensor_param()
    return {name: tensor.detach().clone() for name, tensor in weights}


PLAIN = MegatronEngineWithLMHead
