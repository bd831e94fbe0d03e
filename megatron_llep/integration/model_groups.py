"""The process groups with which a model's MoE layers are built."""

import torch
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection

_NEEDED = ("ep", "tp_ep", "expt_tp", "expt_dp")


def find_groups(
    given: ProcessGroupCollection | None, chunk: torch.nn.Module | None = None
) -> ProcessGroupCollection:
    """Those given, else the model's own, else Megatron's global ones.

    Args:
        given: by the caller; or None.
        chunk: of the model, if it is built; wrapped or not.

    Raises:
        ValueError: there are none, or some are missing; names the way out.
    """
    if given is not None:
        missing = [name for name in _NEEDED if getattr(given, name) is None]
        if missing:
            raise ValueError(
                f"--moe-llep: pg_collection lacks {', '.join(missing)}; give it the groups "
                f"{', '.join(_NEEDED)}"
            )
        return given
    for module in chunk.modules() if chunk is not None else ():
        own = getattr(module, "pg_collection", None)
        if isinstance(own, ProcessGroupCollection) and not any(
            getattr(own, name) is None for name in _NEEDED
        ):
            return own
    if parallel_state.get_expert_model_parallel_group(check_initialized=False) is None:
        raise ValueError(
            "--moe-llep: Megatron's expert-parallel groups are not initialised; switch LLEP on "
            "after initialize_model_parallel, where the model is built, or give the model's groups "
            "as pg_collection"
        )
    return get_default_pg_collection()
