"""Runs for tests: curves as a training gives them, and TensorBoard folders that hold them."""

from pathlib import Path

import numpy as np

from megatron_llep.offline.compare.run_log import Curve, RunLog

STEPS = 200


def make_loss(steps: int = STEPS, speed: float = 1.0) -> np.ndarray:
    """A loss [N] that falls and is noisy as losses of different batches are.

    At another learning rate it falls at another speed, over the same batches.
    """
    noise = np.random.default_rng(0).normal(size=steps)
    return 2.5 + 3.5 * np.exp(-np.arange(steps) * speed / 30) + 0.05 * noise


def rounded(loss: np.ndarray, seed: int, growth: float = 1e-3) -> np.ndarray:
    """The same training in another order of sums: 1e-7 apart, growing to about `growth`."""
    apart = 1e-7 * (growth / 1e-7) ** np.linspace(0, 1, loss.size)
    return loss * (1 + apart * np.random.default_rng(seed).normal(size=loss.size))


def make_curve(values: np.ndarray, step_seconds: float = 1.0) -> Curve:
    """One value a step, from step 1 on."""
    steps = np.arange(1, len(values) + 1)
    return Curve(steps, np.asarray(values, dtype=float), (steps - 1) * step_seconds)


def make_log(name: str, step_seconds: float = 1.0, **metrics: np.ndarray) -> RunLog:
    """A run with these metrics; underscores in names become spaces."""
    curves = {
        metric.replace("_", " "): make_curve(values, step_seconds)
        for metric, values in metrics.items()
    }
    return RunLog(name, f"runs/{name}", curves)


def write_events(
    folder: Path,
    metrics: dict[str, np.ndarray],
    *,
    first_step: int = 1,
    start: float = 1000.0,
    step_seconds: float = 1.0,
) -> Path:
    """One more event file in the folder; step s is logged at start + (s - first) * step_seconds."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder), filename_suffix=f".{start:.0f}") as writer:
        for name, values in metrics.items():
            for place, value in enumerate(values):
                when = start + place * step_seconds
                writer.add_scalar(name, value, first_step + place, walltime=when)
    return folder
