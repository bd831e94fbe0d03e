"""One fetch or return in flight: exchanges that follow each other, on a side stream."""

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist

from megatron_llep.lending.progress import Progress
from megatron_llep.lending.side_stream import SideStream


class PendingExchanges:
    """Runs `steps` up to its first exchange, and on from there with `advance` and `finish`.

    That the next exchange starts by a call, and not at once, keeps the host from waiting for the
    first one (gloo's `wait` blocks), and the device as well where all streams share one queue
    (CUDA_DEVICE_MAX_CONNECTIONS=1): whatever is launched behind a wait would wait with it.
    """

    def __init__(
        self,
        steps: Iterator[dist.Work],
        buffers: Sequence[torch.Tensor],
        *,
        stream: SideStream,
        progress: Progress,
    ):
        """Start the first exchange.

        Args:
            steps: starts an exchange before each `yield`, goes on when it is done. It runs on the
                side stream, so it must allocate nothing that outlives a step.
            buffers: what `steps` uses; allocated on the current stream.
            stream: where it runs.
            progress: tells in errors where this rank was.
        """
        self._steps = steps
        self._buffers = buffers
        self._stream = stream
        self._progress = progress
        with stream.begin(), progress.told_in_errors():
            self._work = next(steps, None)

    def advance(self) -> None:
        """Wait for the exchange in flight, and start the next one if there is one.

        `Work.wait` makes the stream wait that is current: the side stream, not the caller's.
        """
        with self._stream.resume(), self._progress.told_in_errors():
            assert self._work is not None
            self._work.wait()
            self._work = next(self._steps, None)

    def finish(self) -> None:
        """Let the current stream wait for all exchanges and what follows them."""
        while self._work is not None:
            self.advance()
        self._stream.join()
        self._buffers = ()
