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
    cp: int = 1
    """Context parallelism."""
    instances: int = 1
    """Instances of the distributed optimizer, each with shards of everything."""
    pp_before_dp: bool = False
    """Ranks in the order of --use-tp-pp-dp-mapping."""

    @property
    def expert_tp(self) -> int:
        return self.tp if self.etp is None else self.etp

    @property
    def data_parallel(self) -> int:
        shared = self.tp * self.cp
        return self.dp or math.lcm(shared, self.expert_tp * self.ep) // shared

    @property
    def world_size(self) -> int:
        return self.tp * self.cp * self.pp * self.data_parallel

    def __str__(self) -> str:
        sizes = vars(self).items()
        parts = [f"{name}{size}" for name, size in sizes if size and (size > 1 or name == "etp")]
        return "-".join(parts) or "single"


@contextlib.contextmanager
def use_layout(layout: Layout) -> Iterator[None]:
    """Initialise Megatron's process groups and random state, and forget the groups at the end.

    Collective: every rank of a world of ``layout.world_size`` calls it. Where the same layout is in
    use, its groups are kept, and only the random state starts anew: a process keeps the threads of
    every group that it made.
    """
    assert torch.distributed.get_world_size() == layout.world_size
    if parallel_state.model_parallel_is_initialized():
        assert _get_sizes() == _sizes_of(layout), "another layout is in use"
        _seed()
        yield
        return
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.expert_tp,
        context_parallel_size=layout.cp,
        num_distributed_optimizer_instances=layout.instances,
        create_gloo_process_groups=False,
        order="tp-cp-ep-pp-dp" if layout.pp_before_dp else "tp-cp-ep-dp-pp",
    )
    try:
        _seed()
        yield
    finally:
        parallel_state.destroy_model_parallel()


def _seed() -> None:
    torch.manual_seed(SEED)
    tensor_parallel.model_parallel_cuda_manual_seed(SEED, force_reset_rng=True)


def _sizes_of(layout: Layout) -> tuple[int | None, ...]:
    return (layout.tp, layout.cp, layout.pp, layout.vpp, layout.ep, layout.expert_tp)


def _get_sizes() -> tuple[int | None, ...]:
    """Of the layout in use, as `_sizes_of`."""
    return (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_context_parallel_world_size(),
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_virtual_pipeline_model_parallel_world_size(),
        parallel_state.get_expert_model_parallel_world_size(),
        parallel_state.get_expert_tensor_parallel_world_size(),
    )
