"""Routing that is recorded once and obeyed in training: Megatron's router replay.

Letters: b sequences, s tokens each, L MoE layers, K experts of a token, E experts.
"""

import contextlib
from collections.abc import Iterator

import torch
from megatron.core import parallel_state
from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction

Rows = list[torch.Tensor]
"""For each layer int64 [s * b, K], or a sequence-parallel rank's share of that."""


@contextlib.contextmanager
def record_routing() -> Iterator[Rows]:
    """The list is filled with the rows of the one forward within."""
    rows: Rows = []
    RouterReplay.set_global_router_replay_action(RouterReplayAction.RECORD)
    try:
        yield rows
        rows += RouterReplay.get_recorded_data()
    finally:
        stop_replay()


def start_replay(rows: Rows) -> None:
    """Route so from now on: the next forward, and where that is recomputed in its backward."""
    RouterReplay.clear_global_indices()  # a past micro-batch's, whose backward is over
    RouterReplay.set_replay_data(rows)
    RouterReplay.set_global_router_replay_action(RouterReplayAction.REPLAY_FORWARD)


def stop_replay() -> None:
    """Route as the router wants, and forget rows."""
    RouterReplay.clear_global_router_replay_action()
    RouterReplay.clear_global_indices()


def pad_routing(routing: torch.Tensor, length: int, num_experts: int) -> torch.Tensor:
    """Fill up a routing [s, L, K] to `length` tokens; the new ones go to all experts in turn."""
    s, L, K = routing.shape
    pads = (torch.arange(s * K, length * K) % num_experts).to(routing.dtype)
    return torch.cat((routing, pads.view(-1, 1, K).expand(-1, L, K)))


def make_rows(routing: torch.Tensor, *, sequence_parallel: bool) -> Rows:
    """This rank's rows from the routing [b, s, L, K] of a micro-batch."""
    by_token = routing.transpose(0, 1)
    if sequence_parallel:
        size = parallel_state.get_tensor_model_parallel_world_size()
        by_token = by_token.chunk(size)[parallel_state.get_tensor_model_parallel_rank()]
    layers = by_token.reshape(-1, *routing.shape[2:]).long().to(torch.cuda.current_device())
    return [rows.contiguous() for rows in layers.unbind(dim=1)]
