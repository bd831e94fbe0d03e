"""LLEP's metrics as numbers, for loops that log by themselves."""

from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker

from megatron_llep.metrics import LLEPMetricsTracker


def read_metrics(
    pg_collection: ProcessGroupCollection | None = None, *, per_layer: bool = False
) -> dict[str, float]:
    """What the plans of training did since the last call, under the names that Megatron logs.

    Collective: all ranks of the model call it, between steps, as often and in the same order. Each
    call starts anew. Megatron's own report is a reader of its own: where it is called, it logs the
    same values, and neither takes anything from the other. Evaluation is not counted.

    Args:
        pg_collection: the model's groups, of which `tp_dp_cp` and `pp` are used. Default:
            Megatron's global ones.
        per_layer: whether to add each layer's values, as `--moe-per-layer-logging` does.

    Returns:
        `moe/llep/...` by name, the same on all ranks: of several micro-batches or steps the mean,
        but the most of `foreign_mib`. Nothing where LLEP is off or no micro-batch was trained.

    Raises:
        ValueError: there are no groups.
    """
    tracker = get_moe_metrics_tracker()
    if not isinstance(tracker, LLEPMetricsTracker):
        return {}
    if pg_collection is None and not parallel_state.model_parallel_is_initialized():
        raise ValueError(
            "read_metrics: Megatron's global groups are not initialised; give the model's groups "
            "as pg_collection"
        )
    return tracker.read(pg_collection, per_layer=per_layer)
