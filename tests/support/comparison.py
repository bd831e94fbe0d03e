"""Compare what was trained in one layout with what was trained in another."""

import torch

from support.training import TrainResult


def get_relative_difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference relative to the largest expected value (0 where both are all zero)."""
    difference = (actual - expected).abs().max().item()
    scale = expected.abs().max().item()
    return difference / scale if scale else difference


def assert_same_training(
    results: list[TrainResult],
    single: TrainResult,
    *,
    loss_tolerance: float = 1e-5,
    gradient_tolerance: float = 1e-4,
) -> None:
    """Every rank's losses, norms and parts of the gradients are those of a single process."""
    for rank, result in enumerate(results):
        for name in ("losses", "gradient_norms"):
            for actual, expected in zip(getattr(result, name), getattr(single, name), strict=True):
                assert abs(actual - expected) <= loss_tolerance * abs(expected), (
                    f"rank {rank}: {name} {getattr(result, name)} != {getattr(single, name)}"
                )
        _assert_close(rank, "gradient", result, single, gradient_tolerance)
        _assert_close(rank, "parameter", result, single, gradient_tolerance)
    names = {name for result in results for name in result.parameters}
    assert names == set(single.parameters)


def _assert_close(
    rank: int, what: str, result: TrainResult, single: TrainResult, tolerance: float
) -> None:
    whole = getattr(single, what + "s")
    for name, actual in getattr(result, what + "s").items():
        expected = result.shards[name].cut(whole[name])
        difference = get_relative_difference(actual, expected)
        assert difference <= tolerance, f"rank {rank}: {what} of {name} differs by {difference:.1e}"
