"""A rank of `run_ranks` that is one of P all by itself, for a while."""

import contextlib
from collections.abc import Iterator

import torch.distributed as dist

from megatron_llep.offline.one_rank import be_one_rank


@contextlib.contextmanager
def be_alone(rank: int, num_ranks: int) -> Iterator[None]:
    """`be_one_rank` in the place of the only rank's process group, which is made anew after it."""
    dist.destroy_process_group()
    with be_one_rank(rank, num_ranks):
        yield
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
