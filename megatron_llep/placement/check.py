"""Whether the placement kernels of this machine's GPU agree with torch, and how fast they are.

Letters: T tokens, E experts, K experts per token, H hidden size, N = T * K pairs, C chunks.
"""

from collections.abc import Callable

import numpy as np
import torch

from megatron_llep.placement import kernel
from megatron_llep.placement.pairs import Pairs, Placement
from megatron_llep.placement.tokens import place_tokens

CASES = (
    # T, E, K, chunks a (busy) expert, H
    (0, 8, 2, 1, 64),
    (1, 4, 1, 1, 8),
    (33, 8, 3, 3, 100),
    (1000, 128, 4, 2, 2880),
    (4096, 384, 8, 8, 7168),
)
"""What is compared; the last is also timed."""
_TIMED_RUNS = 20


def check_placement_kernel(device: torch.device | str) -> dict:
    """Compare the kernels with torch's version over `CASES`, and time the last of them.

    Args:
        device: a GPU, or the CPU under Triton's interpreter (then nothing is timed).

    Returns:
        `cases`, their number; `equal`, whether all indices were the same; `worst_sum_error`, of
        bf16 sums of rows against fp64, relative to the largest; `milliseconds`, by step, or empty.
    """
    equal, worst = True, 0.0
    for number, (T, E, K, pieces, H) in enumerate(CASES):
        routing_map, chunks = make_case(T, E, K, pieces, seed=number)
        expected = place_tokens(routing_map, chunks)
        on_device = routing_map.to(device)
        listed = kernel.list_pairs(on_device, T * K)
        placement = kernel.place_pairs(listed, chunks, E)
        equal &= has_indices(placement, expected, T)
        rows = torch.randn(T * K, H, dtype=torch.bfloat16, device=device)
        worst = max(worst, find_sum_error(rows, placement, expected, T))
    seconds = {}
    if on_device.is_cuda:
        seconds = _take_times(on_device, chunks, rows, listed, placement)
    return {
        "cases": len(CASES),
        "equal": equal,
        "worst_sum_error": worst,
        "milliseconds": seconds,
    }


def make_case(T: int, E: int, K: int, pieces: int, *, seed: int) -> tuple[torch.Tensor, np.ndarray]:
    """A skewed routing map [T, E], K experts a token, and chunks [2, C] in a random order.

    Some experts get no token; some chunks are empty.
    """
    generator = np.random.default_rng(seed)
    score = 2 * generator.standard_normal(E) + generator.gumbel(size=(T, E))
    routing_map = np.zeros((T, E), dtype=bool)
    np.put_along_axis(routing_map, np.argsort(-score, axis=1)[:, :K], True, axis=1)
    ends = routing_map.sum(0).cumsum()
    cuts = generator.integers(0, T * K + 1, size=E * (pieces - 1))
    ends = np.sort(np.concatenate((ends, cuts)))
    chunks = np.stack((np.append(0, ends[:-1]), np.diff(ends, prepend=0)))
    return torch.from_numpy(routing_map), chunks[:, generator.permutation(len(ends))]


def has_indices(placement: Placement, expected: Placement, num_tokens: int) -> bool:
    """Whether a kernel's indices are those that follow from torch's, `expected`."""
    per_token = expected.token_index.bincount(minlength=num_tokens)
    pairs = (
        (placement.token_index, expected.token_index),
        (placement.pair_index, expected.pair_index),
        (placement.rows_by_token, expected.pair_index.argsort()),
        (placement.token_ends, per_token.cumsum(0)),
    )
    return all(
        found is not None and torch.equal(found.cpu().long(), wanted) for found, wanted in pairs
    )


def find_sum_error(
    rows: torch.Tensor, placement: Placement, expected: Placement, num_tokens: int
) -> float:
    """Largest difference between the kernel's sums of rows and fp64's, over the largest sum."""
    assert placement.rows_by_token is not None
    assert placement.token_ends is not None
    if not rows.numel():
        return 0.0
    found = kernel.sum_rows(rows, placement.rows_by_token, placement.token_ends)
    exact = torch.zeros(num_tokens, rows.shape[1], dtype=torch.float64)
    exact.index_add_(0, expected.token_index, rows.cpu().double())
    return ((found.cpu().double() - exact).abs().max() / exact.abs().max()).item()


def _take_times(
    routing_map: torch.Tensor,
    chunks: np.ndarray,
    rows: torch.Tensor,
    listed: Pairs,
    placement: Placement,
) -> dict[str, float]:
    """Milliseconds of each step, by the kernels and by torch."""
    T, E = routing_map.shape
    index, by_token, ends = placement.token_index, placement.rows_by_token, placement.token_ends
    assert by_token is not None
    assert ends is not None

    def list_by_torch() -> None:
        routing_map.T.reshape(-1).nonzero_static(size=len(rows))

    return {
        "list_pairs": _time(lambda: kernel.list_pairs(routing_map, len(rows))),
        "list_pairs, torch": _time(list_by_torch),
        "place_pairs": _time(lambda: kernel.place_pairs(listed, chunks, E)),
        "sum_rows": _time(lambda: kernel.sum_rows(rows, by_token, ends)),
        "sum_rows, torch": _time(
            lambda: rows.new_zeros(T, rows.shape[1]).index_add_(0, index, rows)
        ),
    }


def _time(step: Callable[[], object]) -> float:
    """Milliseconds a call on the GPU, launches included, after one call that compiles."""
    step()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(_TIMED_RUNS):
        step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / _TIMED_RUNS
