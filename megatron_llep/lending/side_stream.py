"""A CUDA stream beside the one that computes; on a CPU, where work is done on return, nothing."""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial

import torch


class SideStream:
    """Where experts are packed, exchanged and unpacked.

    Whoever uses it keeps to this, and then needs neither `record_stream` nor a host sync (compare
    WeightLoan): memory that the side stream touches is allocated before `begin`, outside of it, and
    let go of after `join`.
    """

    def __init__(self, device: torch.device):
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            # Packing is short and others wait for it: it goes before the kernels of the layer.
            self._stream = torch.cuda.Stream(device, priority=-1)

    def way_back(self) -> Callable[[], contextlib.AbstractContextManager[object]]:
        """What makes the stream that is current here the current one elsewhere, for a while."""
        if self._stream is None:
            return contextlib.nullcontext
        return partial(torch.cuda.stream, torch.cuda.current_stream(self._stream.device))

    @contextlib.contextmanager
    def begin(self) -> Iterator[None]:
        """Run what is within on the side stream, after all that the current one has so far."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with self.resume():
            yield

    @contextlib.contextmanager
    def resume(self) -> Iterator[None]:
        """Run what is within on the side stream, after what is there already."""
        if self._stream is None:
            yield
        else:
            with torch.cuda.stream(self._stream):
                yield

    def join(self) -> None:
        """Let the current stream go on only after all that the side stream has so far."""
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
