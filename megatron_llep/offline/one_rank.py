"""One rank of P in this process alone: its collectives return what no other rank sent.

Letters: P ranks, E experts.

All-gathers hand out this rank's own rows, or the counts that were given; all-to-alls fill what
comes with small random numbers, as many as would have come; the others leave tensors as they are.
Each runs on the stream that is current, as NCCL's begin after it, and `wait` lets streams wait, not
the host. So a layer does all its own work, in its order, for the right numbers of rows; what is not
there is the links, and other ranks to wait for.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

_BACKEND = "llep_one_rank"
_NOISE = 2**22
"""Numbers that are random; what is longer repeats them."""


class OneRankGroup(dist.ProcessGroup):
    """A process group whose other ranks are not there."""

    counts: torch.Tensor | None = None
    """int64 [P, E] on the device: what an all-gather of rows of E counts, or more, brings; None:
    all ranks have this one's."""
    on_gathered: Callable[[], None] | None = None
    """Called when somebody waited for an all-gather into one tensor."""
    on_exchange: Callable[[], None] | None = None
    """Called before each all-to-all."""

    def __init__(self, rank: int, size: int):
        super().__init__(rank, size)
        self._noise: dict[tuple[torch.dtype, torch.device], torch.Tensor] = {}

    @property
    def _device_types(self) -> list[torch.device]:
        return [torch.device("cpu")]

    def _get_backend(self, device: torch.device) -> Any:
        return self

    @property
    def options(self) -> None:
        """None, as of a backend without settings of its own."""
        return None

    def _allgather_base(self, output: torch.Tensor, mine: torch.Tensor, opts: Any = None) -> Any:
        rows = output.view(self.size(), -1)
        rows.copy_(mine.view(1, -1))
        if self.counts is not None:
            rows[:, : self.counts.shape[1]] = self.counts
        return _Done(output.device, self.on_gathered)

    all_gather_single = _allgather_base  # as newer versions of torch call it

    def allgather(
        self, outputs: list[list[torch.Tensor]], mine: list[torch.Tensor], opts: Any = None
    ) -> Any:
        """Every rank has what this one has."""
        for tensor in outputs[0]:
            tensor.copy_(mine[0])
        return _Done(mine[0].device)

    def alltoall_base(
        self,
        output: torch.Tensor,
        mine: torch.Tensor,
        output_sizes: Sequence[int],
        input_sizes: Sequence[int],
        opts: Any = None,
    ) -> Any:
        """Fill the output."""
        if self.on_exchange is not None:
            self.on_exchange()
        flat, key = output.view(-1), (output.dtype, output.device)
        if key not in self._noise:
            generator = torch.Generator(output.device).manual_seed(0)
            noise = torch.empty(_NOISE, dtype=output.dtype, device=output.device)
            self._noise[key] = noise.normal_(std=0.02, generator=generator)
        noise = self._noise[key]
        whole = len(flat) // _NOISE * _NOISE
        if whole:
            flat[:whole].view(-1, _NOISE).copy_(noise)
        flat[whole:].copy_(noise[: len(flat) - whole])
        return _Done(output.device)

    all_to_all_single = alltoall_base  # likewise

    def allreduce(self, tensors: list[torch.Tensor], opts: Any = None) -> Any:
        """Leave them."""
        return _Done(tensors[0].device)

    def broadcast(self, tensors: list[torch.Tensor], opts: Any = None) -> Any:
        """Leave them."""
        return _Done(tensors[0].device)

    def barrier(self, opts: Any = None) -> Any:
        """Everybody is here."""
        return _Done(torch.device("cpu"))


class _Done(dist.Work):
    """A collective that was started on the stream then current."""

    def __init__(self, device: torch.device, on_wait: Callable[[], None] | None = None):
        super().__init__()
        self._event = torch.cuda.current_stream().record_event() if device.type == "cuda" else None
        self._on_wait = on_wait

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Let the current stream wait."""
        if self._event is not None:
            torch.cuda.current_stream().wait_event(self._event)
        if self._on_wait is not None:
            self._on_wait()
        return True


class HostSpan:
    """Seconds of the host in each forward of a layer: from counts to token exchange.

    From when all ranks' counts are there to the start of the first all-to-all of tokens. On a GPU
    the host launches their all-gather and goes on: there say when it begins.
    """

    def __init__(self, dispatcher: Any, clock: Callable[[], float] = time.perf_counter):
        """Watch the groups of a dispatcher, Megatron's or LLEP's, instead of whoever did so."""
        self._clock = clock
        self.taken: list[float] = []
        self._start: float | None = None
        dispatcher.tp_ep_group.on_gathered = self.begin
        dispatcher.ep_group.on_exchange = self._end

    def begin(self, ago: float = 0.0) -> None:
        """The counts are there, since so many seconds."""
        self._start = self._clock() - ago

    def _end(self) -> None:
        if self._start is not None:
            self.taken.append(self._clock() - self._start)
            self._start = None


@contextlib.contextmanager
def be_one_rank(rank: int, num_ranks: int) -> Iterator[None]:
    """Be one expert-parallel rank of so many, with Megatron's groups; the device is chosen.

    The groups that Megatron's `parallel_state` hands out within are `OneRankGroup`s.
    """
    from megatron.core import parallel_state, tensor_parallel

    if not hasattr(dist.Backend, _BACKEND.upper()):
        dist.Backend.register_backend(_BACKEND, _make_group, devices=["cpu", "cuda"])
    dist.init_process_group(_BACKEND, store=dist.HashStore(), rank=rank, world_size=num_ranks)
    try:
        parallel_state.initialize_model_parallel(
            expert_model_parallel_size=num_ranks, create_gloo_process_groups=False
        )
        tensor_parallel.model_parallel_cuda_manual_seed(1, force_reset_rng=True)
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def _make_group(store: Any, rank: int, size: int, timeout: timedelta) -> OneRankGroup:
    return OneRankGroup(rank, size)
