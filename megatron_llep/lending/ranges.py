"""Names of LLEP's steps in profiles: torch.profiler's, and NVTX ranges for Nsight Systems."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch


def step(name: str) -> "_Step":
    """Name what runs within `llep/NAME`; also a decorator.

    Under `torch.autograd.profiler.emit_nvtx`, which Megatron's --profile switches on, the range is
    an NVTX range. Without a profiler it costs next to nothing: the range itself would take longer
    than some of the steps.
    """
    return _Step(name)


class _Step:
    def __init__(self, name: str):
        self._name = name
        self._range: torch.profiler.record_function | None = None

    def __enter__(self) -> None:
        if torch.autograd._profiler_enabled():
            self._range = torch.profiler.record_function(f"llep/{self._name}")
            self._range.__enter__()

    def __exit__(self, *error: Any) -> None:
        if self._range is not None:
            self._range.__exit__(*error)

    def __call__[**P, R](self, method: Callable[P, R]) -> Callable[P, R]:
        """Name all that the method does."""

        @wraps(method)
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            with step(self._name):
                return method(*args, **kwargs)

        return run
