"""Names of LLEP's steps in profiles: torch.profiler's, and NVTX ranges for Nsight Systems."""

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def step(name: str) -> Iterator[None]:
    """Name what runs within `llep/NAME`; also a decorator.

    Under `torch.autograd.profiler.emit_nvtx`, which Megatron's --profile switches on, the range is
    an NVTX range. Without a profiler it costs next to nothing: the range itself would take longer
    than some of the steps.
    """
    if torch.autograd._profiler_enabled():
        with torch.profiler.record_function(f"llep/{name}"):
            yield
    else:
        yield
