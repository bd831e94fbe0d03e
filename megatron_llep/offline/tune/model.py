"""The layer and the rest of the model, as a recording, a file or both know them."""

from dataclasses import fields
from typing import Any

import numpy as np

from megatron_llep.config import LLEPConfig
from megatron_llep.offline.simulator.models import ModelShape
from megatron_llep.offline.tune.sample import Sample
from megatron_llep.planner.cost.model import CostModel, LayerShape


def find_shape(sample: Sample, base: LLEPConfig, model: ModelShape | None) -> LayerShape:
    """The shape of the layer; what the run knew of itself goes before what a file says.

    Args:
        sample: of the run.
        base: its settings, as far as they are not tuned.
        model: from a file, or None.

    Raises:
        ValueError: the sizes of the experts are known from neither, or experts do not match.
    """
    names = {each.name for each in fields(LayerShape)}
    known = {k: v for k, v in sample.model.items() if k in names and v is not None}
    if model is not None and model.layer.num_experts != sample.num_experts:
        raise ValueError(
            f"--model {model.name} has {model.layer.num_experts} experts, and the run "
            f"{sample.num_experts}: give the model that ran"
        )
    shape: dict[str, Any] = {} if model is None else vars(model.layer)
    shape = shape | {"refetch": base.foreign_weights == "refetch"}
    shape = shape | known | {"num_experts": sample.num_experts, "top_k": sample.top_k}
    missing = sorted({"hidden", "ffn_hidden"} - shape.keys())
    if missing:
        raise ValueError(
            f"the recording does not say {' and '.join(missing)} of the experts: give --model, a "
            "name or a file as in configs/"
        )
    if base.grad_dtype == "param" and "bytes_per_gradient" not in known:
        shape["bytes_per_gradient"] = shape.get("bytes_per_element", 2)
    return LayerShape(**{"scatter_from": base.scatter_from, **shape})


def predict_others(
    sample: Sample, model: ModelShape | None, machine: CostModel
) -> np.ndarray | None:
    """Seconds [B] of the rest of the model in each micro-batch; None: nobody says what it is.

    Where a part of the layers was recorded, such as one stage's, as large a part of the rest.
    """
    flops, layers = sample.model.get("other_flops_per_token"), sample.moe_layers
    if flops is None:
        if model is None:
            return None
        flops, layers = model.other_flops_per_token, model.moe_layers
    share = sample.sum_by_batch(np.ones(len(sample.counts))) / layers
    forward = sample.tokens_by_batch() * share * flops / machine.flops_per_second
    return forward * (1 + machine.backward_factor)
