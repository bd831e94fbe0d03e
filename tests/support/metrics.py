"""What Megatron's training log makes of MoE metrics."""

from typing import Any

from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker


class Scalars(dict):
    """What a TensorBoard writer is given."""

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self[name] = value


def report(**kwargs: Any) -> tuple[str, Scalars]:
    """The console's line, and the scalars; all ranks call it, as Megatron's log does."""
    scalars = Scalars()
    line = get_moe_metrics_tracker().report(
        loss_scale=1.0,
        iteration=1,
        writer=scalars,
        per_layer_logging=True,
        track_names=[],
        **kwargs,
    )
    return line, scalars
