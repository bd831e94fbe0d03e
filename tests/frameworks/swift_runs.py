"""ms-swift's own `megatron sft` over mcore-bridge, on a CPU, with this project's layers."""

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

if importlib.util.find_spec("swift") is None or importlib.util.find_spec("mcore_bridge") is None:
    pytest.skip("needs ms-swift: make test-frameworks", allow_module_level=True)

from framework_stubs import install_stubs

install_stubs()

from mcore_bridge.model.register import ModelLoader  # noqa: E402
from swift.megatron.pipelines.train.sft import MegatronSft  # noqa: E402
from swift.megatron.trainers import MegatronTrainer  # noqa: E402
from swift.megatron.utils import prepare_mcore_model  # noqa: E402
from tiny_models import local_layers  # noqa: E402

from support.routing import Routing, force_routing  # noqa: E402

STEPS = 3


@dataclass(frozen=True)
class SwiftRun:
    """What one rank saw."""

    log: list[dict[str, Any]]
    """The lines of logging.jsonl."""


class _Loader:
    def get_transformer_layer_spec(self, vp_stage: int | None = None) -> Any:
        return local_layers(self.config, vp_stage)  # type: ignore[attr-defined]


class SkewedTrainer(MegatronTrainer):
    """Nearly all tokens want one expert.

    mcore-bridge looks for weights by the names of Transformer Engine's fused layers, which are not
    here: the model begins at random, and is not saved.
    """

    def _prepare_peft_model(self, models: list[Any]) -> list[Any]:
        force_routing(models, Routing("hot"))
        return [prepare_mcore_model(self.args, model) for model in models]

    def save_checkpoint(self) -> None:
        pass


class SkewedSft(MegatronSft):
    """The pipeline with that trainer; the process group stays, as it is not ms-swift's."""

    def prepare_trainer(self) -> Any:
        return SkewedTrainer(self.args, self.template)

    def run(self) -> dict[str, Any]:
        datasets = self._prepare_dataset()
        self.args.init_iters(*datasets)
        self.prepare_trainer().train(*datasets)
        return self.train_msg


def run_sft(model: Path, output: Path, *options: str) -> SwiftRun:
    """Train in this rank; options as on the command line."""
    ModelLoader.get_transformer_layer_spec = _Loader.get_transformer_layer_spec
    data = output.parent / "data.jsonl"
    flags = {
        "model": model,
        "model_type": "qwen3_moe",
        "template": "qwen",
        "use_hf": "true",
        "check_model": "false",
        "dataset": data,
        "split_dataset_ratio": 0,
        "dataset_num_proc": 1,
        "dataloader_num_workers": 0,
        "tuner_type": "full",
        "max_length": 192,
        "micro_batch_size": 1,
        "global_batch_size": 4,
        "train_iters": STEPS,
        "logging_steps": 1,
        "lr": 1e-2,
        "min_lr": 1e-2,
        "lr_warmup_fraction": 0,
        "expert_model_parallel_size": 2,
        "attention_backend": "local",
        "overlap_grad_reduce": "true",
        "perform_initialization": "true",
        "moe_grouped_gemm": "false",
        "moe_permute_fusion": "false",
        "gradient_accumulation_fusion": "false",
        "apply_rope_fusion": "false",
        "masked_softmax_fusion": "false",
        "bias_dropout_fusion": "false",
        "no_save_optim": "true",
        "no_save_rng": "true",
        "output_dir": output,
        "add_version": "false",
    }
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    SkewedSft([*words, *options]).main()
    lines = (output / "logging.jsonl").read_text().splitlines()
    return SwiftRun([json.loads(line) for line in lines])


def write_data(path: Path) -> None:
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"{i} + {2 * i}"},
                {"role": "assistant", "content": f"{3 * i}"},
            ]
        }
        for i in range(12)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
