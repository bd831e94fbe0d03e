"""A parallel layout, and Megatron's process groups for it."""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from megatron.core import parallel_state, tensor_parallel

SEED = 1234


@dataclass(frozen=True)
class Layout:
    """How many ranks share what. By default the smallest world that holds the experts."""

    tp: int = 1
    pp: int = 1
    vpp: int | None = None
    """Model chunks per pipeline stage."""
    ep: int = 1
    etp: int | None = None
    """Expert tensor parallelism; None: as tp."""
    dp: int | None = None
    """Data parallelism of the dense layers; None: the least that holds the experts."""

    @property
    def expert_tp(self) -> int:
        return self.tp if self.etp is None else self.etp

    @property
    def data_parallel(self) -> int:
        return self.dp or math.lcm(self.tp, self.expert_tp * self.ep) // self.tp

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.data_parallel

    def __str__(self) -> str:
        sizes = vars(self).items()
        parts = [f"{name}{size}" for name, size in sizes if size and (size > 1 or name == "etp")]
        return "-".join(parts) or "single"


@contextlib.contextmanager
def use_layout(layout: Layout) -> Iterator[None]:
    """Initialise Megatron's process groups and random state, and forget the groups at the end.

    Collective: every rank of a world of ``layout.world_size`` calls it.
    """
    assert torch.distributed.get_world_size() == layout.world_size
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.expert_tp,
        create_gloo_process_groups=False,
    )
    try:
        torch.manual_seed(SEED)
        tensor_parallel.model_parallel_cuda_manual_seed(SEED, force_reset_rng=True)
        yield
    finally:
        parallel_state.destroy_model_parallel()
