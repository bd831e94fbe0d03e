"""What a recording says of the run as a whole.

Letters: D replicas of each expert that share tokens (1, unless tokens are spread over replicas).
"""

import dataclasses
from typing import TYPE_CHECKING, Any

from megatron_llep.compat.loop import read_loop_arguments
from megatron_llep.config import LLEPConfig
from megatron_llep.offline.simulator.models import make_model
from megatron_llep.planner.cost.layer import get_layer_shape

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_llep.offline.recording import RecordingInfo


def make_info(
    config: "TransformerConfig",
    llep: LLEPConfig,
    groups: "ProcessGroupCollection",
    ranks_per_host: int | None = None,
) -> "RecordingInfo":
    """For a model's MoE layers.

    Args:
        config: of the model.
        llep: of the run.
        groups: of the layers, as they are without LLEP; `ep` and `expt_dp` are used.
        ranks_per_host: of the ranks that share tokens, as their hostnames tell.

    Raises:
        ImportError: pyarrow is missing.
    """
    from megatron_llep.offline.recording import RecordingInfo

    replicas = groups.expt_dp.size() if llep.replicas == "expert-dp" else 1
    return RecordingInfo(
        num_ranks=groups.ep.size() * replicas,
        num_experts=config.num_moe_experts * replicas,
        top_k=config.moe_router_topk,
        num_layers=config.num_layers + (config.mtp_num_layers or 0),
        planner=llep.planner,
        settings=dataclasses.asdict(llep),
        ranks_per_host=ranks_per_host,
        model=dataclasses.asdict(get_layer_shape(config, llep)) | _describe_rest(),
    )


def _describe_rest() -> dict[str, Any]:
    """What the simulator asks beside; nothing where Megatron's arguments do not tell."""
    args = read_loop_arguments()
    if args is None:
        return {}
    flags = {
        name.replace("_", "-"): value
        for name, value in vars(args).items()
        if value is not None and value is not False
    }
    if "group-query-attention" not in flags:
        flags.pop("num-query-groups", None)  # has a default
    try:
        model = make_model("recorded", flags, tokens_per_rank=0)
    except (KeyError, TypeError, ValueError):  # a model of another kind
        return {}
    return {"other_flops_per_token": model.other_flops_per_token}
