"""One rank's MoE layer alone on one device: Megatron's, and the same with LLEP, over one group.

Letters: P ranks, E experts, T (token, expert) pairs of a rank, H hidden size.

Of the P ranks there is one (`offline.one_rank`). Both layers have the very same experts. As in the
published LLEP benchmark a token may choose an expert several times, so "95% into 1 expert" is 95%
of all pairs: every pair is a token here, and goes to one expert. Routers hand out what is given.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.layer_case import Sizes, build_layer
from gpu_checks.demands import PLAIN, Pass
from megatron_llep.config import LLEPConfig
from megatron_llep.integration.convert import convert_model
from megatron_llep.offline.one_rank import HostSpan
from megatron_llep.offline.simulator.models import ModelShape

_HEAD_START = 4_000_000
"""Cycles, 2 ms, that the device waits, so that the host is ahead of it, as it is in training."""


class RankLayers:
    """The layers of one rank, with input and routing."""

    def __init__(self, model: ModelShape, kind: str, rank: int, num_ranks: int):
        """Build them within `be_one_rank`; `kind` as `critical_path.KINDS`."""
        shape, te = model.layer, kind == "te"
        sizes = Sizes(
            num_ranks=num_ranks,
            hidden=shape.hidden,
            ffn_hidden=shape.ffn_hidden,
            num_experts=shape.num_experts,
            tokens_per_rank=model.tokens_per_rank * shape.top_k,
            dtype=torch.bfloat16,
        )
        self._rank, self._on_gpu = rank, torch.cuda.is_available()
        plain, self._lending = (build_layer(sizes, rank, transformer_engine=te) for _ in range(2))
        convert_model([self._lending], LLEPConfig(expert_gemm="megatron" if te else "grouped_mm"))
        plain.experts = self._lending.experts
        self._plain = plain
        self._lending.token_dispatcher.on_plan.append(self._note)
        self._experts = list(plain.experts.parameters())
        _give_main_grads(plain.experts)
        device = self._experts[0].device
        generator = torch.Generator(device).manual_seed(rank)
        hidden = torch.empty(sizes.tokens_per_rank, 1, shape.hidden, device=device)
        self._rows = hidden.normal_(generator=generator).bfloat16()
        self._hidden = self._rows
        self.lent = 0
        """Experts lent in the last pass, by all ranks."""

    def route(self, counts: np.ndarray) -> None:
        """Let this rank's and all others' tokens choose experts: counts [P, E]."""
        E, device = counts.shape[1], self._rows.device
        experts = torch.arange(E).repeat_interleave(torch.from_numpy(counts[self._rank]))
        order = torch.randperm(len(experts), generator=torch.Generator().manual_seed(0))
        chosen = experts[order].to(device)[:, None]
        routing_map = torch.zeros(len(experts), E, dtype=torch.bool, device=device)
        routing_map.scatter_(1, chosen, True)
        probs = routing_map.float().requires_grad_()
        self._hidden = self._rows[: len(experts)].detach().requires_grad_()
        for layer in (self._plain, self._lending):
            layer.router.forward = lambda *_, **__: (probs, routing_map)
            layer.token_dispatcher.tp_ep_group.counts = torch.from_numpy(counts).to(device)

    def run(self, method: str, *, head_start: bool = True) -> Pass:
        """Forward and backward under `PLAIN` or a planner."""
        layer: Any = self._plain
        if method != PLAIN:
            layer = self._lending
            options: dict[str, Any] = {"planner": method}
            layer.token_dispatcher.llep = LLEPConfig(**options)
        self.lent, self._span = 0, HostSpan(layer.token_dispatcher)
        start, middle, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        if self._on_gpu and head_start:
            torch.cuda._sleep(_HEAD_START)
        start.record()
        output, _ = layer(self._hidden)
        middle.record()
        output.backward(self._hidden.detach())  # it serves as gradient, too
        end.record()
        end.synchronize()
        self._hidden.grad = None
        for parameter in self._experts:
            parameter.grad = None  # as Megatron's DDP does when it has added it
        knows_host = method != PLAIN or not self._on_gpu
        return Pass(
            forward_seconds=start.elapsed_time(middle) / 1e3,
            layer_seconds=start.elapsed_time(end) / 1e3,
            idle_seconds=None,
            host_seconds=self._span.taken[0] if knows_host else None,
            peak_bytes=torch.cuda.max_memory_allocated() if self._on_gpu else None,
        )

    def find_busy_seconds(self, method: str) -> float | None:
        """How long the device computed or copied in one pass; None where no profiler sees it."""
        if not self._on_gpu:
            return None
        with profile(activities=[ProfilerActivity.CUDA]) as found:
            self.run(method, head_start=False)
        spans = [
            (event.time_range.start, event.time_range.end)
            for event in found.events()
            if event.device_type == DeviceType.CUDA and not event.is_user_annotation
        ]
        return add_up(spans) / 1e6 if spans else None

    def _note(self, planned: Any) -> None:
        self.lent = len(planned.plan.transfers)
        # On a GPU the counts were not there when the all-gather had been launched.
        self._span.begin(ago=planned.plan_seconds)


def add_up(spans: Iterable[tuple[float, float]]) -> float:
    """Length of all spans together; where some overlap it counts once."""
    total, until = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def _give_main_grads(experts: torch.nn.Module) -> None:
    """Places for weight gradients as Megatron's DDP has them: fp32, alike ones in one buffer."""
    by_shape: dict[torch.Size, list[Any]] = {}
    for parameter in experts.parameters():
        by_shape.setdefault(parameter.shape, []).append(parameter)
    for shape, parameters in by_shape.items():
        buffer = torch.zeros(len(parameters), *shape, device=parameters[0].device)
        for parameter, place in zip(parameters, buffer, strict=True):
            parameter.main_grad, parameter.grad_added_to_main_grad = place, False
    for module in experts.modules():  # Transformer Engine's then add to it in their GEMMs
        if hasattr(module, "fuse_wgrad_accumulation"):
            module.fuse_wgrad_accumulation = True
