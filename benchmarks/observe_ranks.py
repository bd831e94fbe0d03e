"""The processes of the observing benchmark: they train the demo's model, plain and observed."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from megatron_llep.config import LLEPConfig
from megatron_llep.device import use_cpu_if_no_gpu
from megatron_llep.offline.launch.flags import load_config

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "demo.yaml"
RANKS = 2
PLAIN, OBSERVED = "plain", "observed"
ORDER = (PLAIN, OBSERVED, OBSERVED, PLAIN)
"""Blocks of a round: what drifts steadily slows both alike."""
WARM_UP = 3
VOCABULARY = 384  # 257 ids, padded as Megatron pads them


@dataclass(frozen=True, kw_only=True)
class Job:
    """What all ranks do."""

    rounds: int
    steps: int
    """Of a block."""


Span = tuple[float, float]
"""Seconds that have passed, and seconds of the processor in this thread."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """What one rank found."""

    steps: dict[str, list[Span]]
    """By variant."""
    own: list[Span]
    """Of each observed step, in hooks, and in what reports do besides Megatron's."""


def train_in_turns(rank: int, store: Path, job: Job) -> Found:
    """Be a rank."""
    os.environ |= {"RANK": str(rank), "GLOO_SOCKET_IFNAME": "lo"}
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    torch.set_num_threads(1)
    use_cpu_if_no_gpu()
    from megatron.core import parallel_state, tensor_parallel

    file_store = dist.FileStore(str(store), RANKS)
    dist.init_process_group("gloo", store=file_store, rank=rank, world_size=RANKS)
    parallel_state.initialize_model_parallel(
        expert_model_parallel_size=RANKS, create_gloo_process_groups=False
    )
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    found = _take_times(rank, job)
    dist.barrier()
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
    return found


def _take_times(rank: int, job: Job) -> Found:
    trainer = _Trainer(rank)
    steps: dict[str, list[Span]] = {PLAIN: [], OBSERVED: []}
    in_own: list[Span] = []
    for number in range(job.rounds + 1):
        for variant in ORDER:
            with trainer.as_variant(variant) as own:
                for _ in range(job.steps if number else WARM_UP):
                    dist.barrier()
                    own.clear()
                    start = _now()
                    trainer.step()
                    taken = _since(start)
                    if number:
                        steps[variant].append(taken)
                        if variant == OBSERVED:
                            passed, worked = zip(*own, strict=True)
                            in_own.append((sum(passed), sum(worked)))
        if rank == 0:
            print(f"round {number} of {job.rounds}", flush=True)
    return Found(steps=steps, own=in_own)


def _now() -> Span:
    return time.perf_counter(), time.thread_time()


def _since(start: Span) -> Span:
    passed, worked = _now()
    return passed - start[0], worked - start[1]


class _Trainer:
    """The demo's model on one rank, its optimizer, and Megatron's report after each step."""

    def __init__(self, rank: int) -> None:
        from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
        from megatron.core.models.gpt import GPTModel
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

        from megatron_llep.integration.local_spec import build_local_block_spec

        flags = load_config(CONFIG)["MODEL_ARGS"]
        self._shape = (int(flags["--micro-batch-size"]), int(flags["--seq-length"]))
        self._layers = int(flags["--num-layers"])
        self._generator = torch.Generator().manual_seed(rank)
        config = _make_config(flags)
        self.model = GPTModel(
            config,
            build_local_block_spec(config),
            vocab_size=VOCABULARY,
            max_sequence_length=self._shape[1],
            share_embeddings_and_output_weights=False,
            position_embedding_type="rope",
        )
        self._wrapped = DistributedDataParallel(
            config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), self.model
        )
        self._optimizer = get_megatron_optimizer(
            config=OptimizerConfig(optimizer="adam", lr=1e-3, weight_decay=0.1, clip_grad=1.0),
            model_chunks=[self._wrapped],
            use_gloo_process_groups=False,
        )

    @contextmanager
    def as_variant(self, variant: str) -> Iterator[list[Span]]:
        """Let the model be observed or not; own calls are added to a list."""
        from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker

        from megatron_llep.integration.convert import convert_model
        from megatron_llep.metrics import tracker
        from megatron_llep.observe.watch import RouterHook

        own: list[Span] = []
        destroy_moe_metrics_tracker()
        for module in self.model.modules():
            module._forward_hooks.clear()
        if variant == PLAIN:
            yield own
            return
        convert_model([self.model], LLEPConfig(planner="observe"))
        with (
            _timed(RouterHook, "__call__", own),
            _timed(tracker.LLEPMetricsTracker, "_put_together", own),
            _timed(tracker, "format_line", own),
        ):
            yield own

    def step(self) -> None:
        """One of Megatron's training loop: forward, backward, update, the mean loss, the report."""
        from megatron.core.distributed import finalize_model_grads
        from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker

        tokens = torch.randint(257, (self._shape[0], self._shape[1] + 1), generator=self._generator)
        self._wrapped.zero_grad_buffer()
        self._optimizer.zero_grad()
        positions = torch.arange(self._shape[1]).expand(self._shape)
        loss = self._wrapped(tokens[:, :-1], positions, None, labels=tokens[:, 1:]).mean()
        loss.backward()
        finalize_model_grads([self._wrapped])
        self._optimizer.step()
        dist.all_reduce(loss.detach())
        get_moe_metrics_tracker().report(
            loss_scale=1.0,
            iteration=1,
            num_layers=self._layers,
            track_names=[],
            force_initialize=True,
        )


@contextmanager
def _timed(owner: Any, name: str, own: list[Span]) -> Iterator[None]:
    call = getattr(owner, name)

    def run(*args: Any, **kwargs: Any) -> Any:
        start = _now()
        result = call(*args, **kwargs)
        own.append(_since(start))
        return result

    with mock.patch.object(owner, name, run):
        yield


def _make_config(flags: dict[str, Any]) -> Any:
    from megatron.core.transformer.transformer_config import TransformerConfig

    return TransformerConfig(
        num_layers=int(flags["--num-layers"]),
        hidden_size=int(flags["--hidden-size"]),
        ffn_hidden_size=int(flags["--ffn-hidden-size"]),
        num_attention_heads=int(flags["--num-attention-heads"]),
        kv_channels=int(flags["--kv-channels"]),
        num_moe_experts=int(flags["--num-experts"]),
        moe_router_topk=int(flags["--moe-router-topk"]),
        moe_ffn_hidden_size=int(flags["--moe-ffn-hidden-size"]),
        moe_router_load_balancing_type="none",
        moe_aux_loss_coeff=0.0,
        moe_router_dtype="fp32",
        moe_token_dispatcher_type="alltoall",
        activation_func=torch.nn.functional.silu,
        gated_linear_unit=True,
        add_bias_linear=False,
        normalization="RMSNorm",
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=0.02,
        transformer_impl="local",
        gradient_accumulation_fusion=False,
        expert_model_parallel_size=RANKS,
    )
