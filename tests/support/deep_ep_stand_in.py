"""A stand-in for the package `deep_ep` without a GPU: its buffers' calls, with rows moved by gloo.

Letters: T tokens of this rank, H hidden size, R ranks, V experts of all ranks, L = V / R of one,
K experts of a token, A tokens and n rows that arrive.

Megatron's `fused_a2a` runs on it unchanged. The calls, what they take and what they return are
those of DeepEP's `Buffer` and of `HybridEPBuffer` of its branch hybrid-ep; unlike the kernels it
takes hidden states of any dtype, which is what parity in float64 needs.
"""

import importlib
import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist


def install() -> None:
    """Let Megatron find it, for the rest of this process: call it in a forked rank."""
    package, utils = ModuleType("deep_ep"), ModuleType("deep_ep.utils")
    package.Buffer, package.HybridEPBuffer = Buffer, HybridEPBuffer
    utils.EventHandle, utils.EventOverlap = EventHandle, EventOverlap
    sys.modules |= {"deep_ep": package, "deep_ep.utils": utils}

    from megatron.core.transformer.moe import fused_a2a, token_dispatcher

    importlib.reload(fused_a2a)
    assert fused_a2a.HAVE_DEEP_EP
    assert fused_a2a.HAVE_HYBRIDEP
    names = ("fused_dispatch", "fused_combine", "set_deepep_num_sms")
    for name in (*names, "hybrid_ep_dispatch", "hybrid_ep_combine"):
        setattr(token_dispatcher, name, getattr(fused_a2a, name))


class EventHandle:
    """A point in time; on a CPU all is done by then."""

    def current_stream_wait(self) -> None:
        return None


class EventOverlap:
    def __init__(self, event: EventHandle | None = None):
        self.event = event

    def current_stream_wait(self) -> None:
        assert self.event is not None
        self.event.current_stream_wait()


def _end(async_finish: bool) -> EventOverlap:
    return EventOverlap(EventHandle() if async_finish else None)


@dataclass(frozen=True)
class Rows:
    """Which rows went from and to this rank."""

    tokens: torch.Tensor
    """[n] rows of the input that were sent, by the rank they went to."""
    sent: list[int]
    received: list[int]
    num_tokens: int
    group: dist.ProcessGroup

    @classmethod
    def of(cls, is_in_rank: torch.Tensor, group: dist.ProcessGroup) -> "Rows":
        """From bool [T, R]."""
        sent = is_in_rank.sum(0)
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=group)
        tokens = is_in_rank.T.nonzero()[:, 1]
        return cls(tokens, sent.tolist(), received.tolist(), len(is_in_rank), group)

    def send(self, rows: torch.Tensor) -> torch.Tensor:
        """What goes with each row that is sent."""
        arrived = rows.new_empty(sum(self.received), *rows.shape[1:])
        dist.all_to_all_single(
            arrived, rows.contiguous(), self.received, self.sent, group=self.group
        )
        return arrived

    def bring_back(self, arrived: torch.Tensor) -> torch.Tensor:
        """[A, ...] -> [n, ...]."""
        rows = arrived.new_empty(sum(self.sent), *arrived.shape[1:])
        dist.all_to_all_single(
            rows, arrived.contiguous(), self.sent, self.received, group=self.group
        )
        return rows

    def add_up(self, arrived: torch.Tensor) -> torch.Tensor:
        """[A, ...] -> [T, ...]."""
        rows = self.bring_back(arrived)
        return rows.new_zeros(self.num_tokens, *rows.shape[1:]).index_add_(0, self.tokens, rows)


class Buffer:
    """DeepEP's, of its kernels for training."""

    num_sms = 20

    def __init__(self, group: dist.ProcessGroup, num_nvl_bytes: int, num_rdma_bytes: int):
        self.group = group
        self.num_nvl_bytes, self.num_rdma_bytes = num_nvl_bytes, num_rdma_bytes

    @staticmethod
    def set_num_sms(num_sms: int) -> None:
        Buffer.num_sms = num_sms

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Any:
        return SimpleNamespace(
            get_nvl_buffer_size_hint=lambda hidden_bytes, ranks: hidden_bytes * ranks,
            get_rdma_buffer_size_hint=lambda hidden_bytes, ranks: 0,
        )

    get_combine_config = get_dispatch_config

    def get_dispatch_layout(
        self,
        topk_idx: torch.Tensor,
        num_experts: int,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Any, ...]:
        R = self.group.size()
        assert topk_idx.dtype == torch.int64
        assert topk_idx.is_contiguous()
        assert num_experts % R == 0
        assert not (topk_idx >= num_experts).any()
        rank = torch.where(topk_idx < 0, R, topk_idx // (num_experts // R))
        is_in_rank = torch.zeros(len(topk_idx), R + 1, dtype=torch.bool)
        is_in_rank = is_in_rank.scatter_(1, rank, True)[:, :R].contiguous()
        per_expert = torch.bincount(topk_idx[topk_idx >= 0], minlength=num_experts)
        per_rank = is_in_rank.sum(0)
        return per_rank.int(), None, per_expert.int(), is_in_rank, _end(async_finish)

    def dispatch(
        self,
        x: torch.Tensor,
        handle: Rows | None = None,
        num_tokens_per_rank: torch.Tensor | None = None,
        num_tokens_per_rdma_rank: torch.Tensor | None = None,
        is_token_in_rank: torch.Tensor | None = None,
        num_tokens_per_expert: torch.Tensor | None = None,
        topk_idx: torch.Tensor | None = None,
        topk_weights: torch.Tensor | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Any, ...]:
        assert x.is_contiguous()
        if handle is not None:
            assert topk_idx is None
            return handle.send(x[handle.tokens]), None, None, None, None, _end(async_finish)
        assert topk_idx is not None
        assert topk_weights is not None
        assert topk_weights.dtype == torch.float32
        assert topk_weights.shape == topk_idx.shape
        assert topk_weights.is_contiguous()
        assert is_token_in_rank is not None
        assert num_tokens_per_expert is not None
        rows = Rows.of(is_token_in_rank, self.group)
        L = len(num_tokens_per_expert) // self.group.size()
        to = torch.arange(self.group.size()).repeat_interleave(torch.tensor(rows.sent))
        local = topk_idx[rows.tokens] - (to * L).unsqueeze(1)
        is_there = (local >= 0) & (local < L)
        recv_idx = rows.send(local.masked_fill(~is_there, -1))
        recv_weights = rows.send(topk_weights[rows.tokens].masked_fill(~is_there, 0.0))
        recv_x = rows.send(x[rows.tokens])
        per_expert = torch.bincount(recv_idx[recv_idx >= 0], minlength=L).tolist()
        return recv_x, recv_idx, recv_weights, per_expert, rows, _end(async_finish)

    def combine(
        self,
        x: torch.Tensor,
        handle: Rows,
        topk_weights: torch.Tensor | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None, EventOverlap]:
        assert x.is_contiguous()
        weights = None
        if topk_weights is not None:
            assert topk_weights.is_contiguous()
            assert topk_weights.dtype == torch.float32
            weights = handle.add_up(topk_weights)
        return handle.add_up(x), weights, _end(async_finish)


class HybridEPBuffer:
    """HybridEP's: rows arrive by expert, then source, then token."""

    def __init__(
        self,
        group: dist.ProcessGroup,
        hidden_dim: int,
        max_num_of_tokens_per_rank: int,
        num_local_experts: int,
        use_fp8: bool = False,
        **settings: int,
    ):
        assert group.size() > 1
        assert not use_fp8
        self.group = group
        self.made_for = [num_local_experts]
        """Experts a rank, each time that it had to be made, or made larger."""

    def dispatch_with_permute(
        self,
        *,
        hidden: torch.Tensor,
        routing_map: torch.Tensor | None = None,
        probs: torch.Tensor | None = None,
        scaling_factor: torch.Tensor | None = None,
        num_of_experts_per_rank: int | None = None,
        num_permuted_tokens: int | None = None,
        pad_multiple: int | None = None,
        handle: tuple[Any, ...] | None = None,
        non_blocking: bool = False,
        fuse_permute_dispatch: bool = False,
    ) -> tuple[Any, ...]:
        assert pad_multiple is None
        assert not non_blocking or num_permuted_tokens is not None
        if handle is None:
            assert routing_map is not None
            handle = self._list(hidden, routing_map, num_of_experts_per_rank)
        rows, columns, order, per_expert, *_ = handle
        assert len(hidden) == rows.num_tokens
        assert num_permuted_tokens is None or int(num_permuted_tokens) == len(order)
        arrived = rows.send(hidden[rows.tokens])[order]
        of_rows = None
        if probs is not None:
            assert probs.dtype == torch.float32
            of_rows = rows.send(probs[rows.tokens, columns])[order]
        return arrived, of_rows, None, per_expert, handle

    def combine_with_unpermute(
        self,
        *,
        hidden: torch.Tensor,
        probs: torch.Tensor | None = None,
        handle: tuple[Any, ...],
        pad_multiple: int | None = None,
        fuse_unpermute_combine: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        rows, columns, order, _, V, _ = handle
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order))
        of_pairs = None
        if probs is not None:
            of_pairs = probs.new_zeros(rows.num_tokens, V)
            of_pairs[rows.tokens, columns] = rows.bring_back(probs[back])
        return rows.add_up(hidden[back]), of_pairs

    def _list(
        self, hidden: torch.Tensor, routing_map: torch.Tensor, experts_per_rank: int | None
    ) -> tuple[Any, ...]:
        """Rows, the expert of each that is sent, the order of those that arrive, their counts."""
        assert routing_map.dtype == torch.bool
        T, V = routing_map.shape
        R, L = self.group.size(), experts_per_rank
        assert L is not None
        assert R * L == V
        if self.made_for[-1] < L:
            self.made_for.append(L)
        assert len(hidden) == T
        everyone: list[Any] = [None] * R
        dist.all_gather_object(everyone, T, group=self.group)
        assert len(set(everyone)) == 1, "HybridEP wants equally many tokens on all ranks"
        columns, tokens = routing_map.T.nonzero().T
        sent = torch.bincount(columns // L, minlength=R)
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=self.group)
        rows = Rows(tokens, sent.tolist(), received.tolist(), T, self.group)
        experts = rows.send(columns % L)
        order = experts.argsort(stable=True)
        overflows = torch.zeros(1, dtype=torch.int32)
        return rows, columns, order, torch.bincount(experts, minlength=L), V, overflows
