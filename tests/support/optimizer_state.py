"""What Megatron's optimizers remember about each parameter, by the parameter's global name."""

from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from support.weights import NamedParameter


def read_optimizer_state(optimizer: Any, named: list[NamedParameter]) -> dict[str, torch.Tensor]:
    """Momentum or moments, and fp32 master weights, of this rank as "name/what" -> tensor.

    Under the distributed optimizer these are the shards that this rank owns.
    """
    names = {each.parameter: each.name for each in named}
    found: dict[str, torch.Tensor] = {}
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        for model_param, state in _states(part, names):
            for what, value in state.items():
                if isinstance(value, torch.Tensor) and value.dim() > 0:
                    found[f"{names[model_param]}/{what}"] = value.detach().clone()
    return found


def _states(part: Any, names: dict[torch.nn.Parameter, str]) -> Any:
    """(model parameter, its state) of every parameter that this optimizer steps."""
    if isinstance(part, DistributedOptimizer):
        for model_param in part.model_param_group_index_map:
            yield model_param, part._get_main_param_and_optimizer_states(model_param)
        return
    stepped = {main for group in part.param_groups for main in group["params"]}
    for model_param in names:
        main = getattr(model_param, "main_param", model_param)
        if main in stepped:
            yield model_param, {"param": main, **part.optimizer.state[main]}
