"""What a script logs beside Megatron's loop: on the console, in TensorBoard and in wandb."""

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.training import get_tensorboard_writer, get_wandb_writer


def average(values: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Mean of all data-parallel ranks' values by name; all ranks call it, with the same names.

    A name without any value anywhere is left out.
    """
    sums = torch.tensor(
        [[float(sum(each)), float(len(each))] for each in values.values()],
        dtype=torch.float64,
        device=torch.cuda.current_device(),
    )
    dist.all_reduce(sums, group=parallel_state.get_data_parallel_group())
    pairs = zip(values, sums.tolist(), strict=True)
    return {name: total / count for name, (total, count) in pairs if count}


def log_scalars(values: Mapping[str, float], iteration: int, *, prefix: str) -> None:
    """Write to TensorBoard and wandb, on the rank that has them."""
    named = {prefix + name: value for name, value in values.items()}
    writer, wandb = get_tensorboard_writer(), get_wandb_writer()
    if writer is not None:
        for name, value in named.items():
            writer.add_scalar(name, value, iteration)
    if wandb is not None:
        wandb.log(named, iteration)


def format_values(values: Mapping[str, float]) -> str:
    """For a line of Megatron's log."""
    return "".join(f" {name.replace('_', ' ')}: {value:.4f} |" for name, value in values.items())
