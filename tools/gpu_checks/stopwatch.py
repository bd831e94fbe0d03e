"""Time and peak memory of one rank's expert work, forward and backward.

Shape letters: N (token, expert) pairs of the rank, H hidden size.
"""

import time
from dataclasses import dataclass

import torch

from gpu_checks.experts import Backward, Experts, Slab


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One forward and backward."""

    forward_seconds: float
    backward_seconds: float
    peak_bytes: int | None
    """Most memory the rank's experts held at once, None where torch does not count: weights and
    gradients of their slots, the input rows, in backward the output's gradient, and whatever
    was allocated on the way."""
    device_allocations: int
    """Times that the caching allocator asked the driver for memory, which takes time."""

    @property
    def seconds(self) -> float:
        """Forward and backward."""
        return self.forward_seconds + self.backward_seconds


_HEAD_START = 4_000_000
"""Cycles, 2 ms, that the device waits, so that the host is ahead of it, as it is in training."""


def run_once(
    experts: Experts, slab: Slab, rows: torch.Tensor, tokens: list[int], num_native: int
) -> Pass:
    """Run one rank's experts once, alone on the device.

    `rows` [N, H] serve as input and as the gradient of the output, which saves memory on the
    device; the peak counts them twice. Of the slots, `num_native` are the rank's own.
    """
    if rows.device.type != "cuda":
        start = time.perf_counter()
        backward = _run_forward(experts, slab, rows, tokens, num_native)
        middle = time.perf_counter()
        backward(rows)
        return Pass(
            forward_seconds=middle - start,
            backward_seconds=time.perf_counter() - middle,
            peak_bytes=None,
            device_allocations=0,
        )
    start, middle, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
    before = torch.cuda.memory_allocated(rows.device)
    allocations = _count_device_allocations(rows.device)
    torch.cuda.reset_peak_memory_stats(rows.device)
    torch.cuda._sleep(_HEAD_START)
    start.record()
    backward = _run_forward(experts, slab, rows, tokens, num_native)
    middle.record()
    forward_peak = torch.cuda.max_memory_allocated(rows.device) - before
    torch.cuda.reset_peak_memory_stats(rows.device)
    backward(rows)
    end.record()
    backward_peak = torch.cuda.max_memory_allocated(rows.device) - before
    end.synchronize()
    return Pass(
        forward_seconds=start.elapsed_time(middle) / 1e3,
        backward_seconds=middle.elapsed_time(end) / 1e3,
        peak_bytes=slab.nbytes + rows.nbytes + max(forward_peak, rows.nbytes + backward_peak),
        device_allocations=_count_device_allocations(rows.device) - allocations,
    )


def _run_forward(
    experts: Experts, slab: Slab, rows: torch.Tensor, tokens: list[int], num_native: int
) -> Backward:
    outputs, backward = experts(slab, rows, tokens, num_native)
    # In training the combine frees them; an implementation may hold them for its own backward.
    for output in outputs:
        output.untyped_storage().resize_(0)
    return backward


def _count_device_allocations(device: torch.device) -> int:
    return torch.cuda.memory_stats(device).get("num_device_alloc", 0)


def estimate_bytes(*, slots: int, pairs: int, hidden: int, ffn: int, itemsize: int = 2) -> int:
    """Memory on the device that `run_once` needs at most, on torch's grouped GEMM."""
    weights = 3 * slots * hidden * ffn
    # Input rows, and the largest of: forward; backward of fc2 and activation; backward of fc1.
    per_pair = hidden + max(3 * ffn + hidden, 6 * ffn, 2 * ffn + hidden)
    gradient = 2 * slots * hidden * ffn * itemsize  # of fc1, before it is added
    return weights * (itemsize + 4) + pairs * per_pair * itemsize + gradient
