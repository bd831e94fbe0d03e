"""Train a tiny real GPTModel with experts, in any layout, on the same weights and tokens.

Shape letters: b = micro-batch size, s = sequence length.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from megatron_llep.integration.local_spec import build_local_block_spec, build_local_mtp_spec
from support.layout import SEED, Layout, use_layout
from support.optimizer_state import read_optimizer_state
from support.routing import Routing, force_routing
from support.weights import Shard, fill_parameters, list_parameters

VOCABULARY = 64

Chunks = list[torch.nn.Module]


def make_tokens(run: "Run", step: int, micro_batch: int) -> torch.Tensor:
    """Token ids [b, s + 1] of a micro-batch, counted over the whole world."""
    generator = torch.Generator().manual_seed(SEED + 1000 * step + micro_batch)
    shape = (run.micro_batch_size, run.sequence_length + 1)
    return torch.randint(VOCABULARY, shape, generator=generator)


@dataclass(frozen=True)
class Run:
    """What to train. Two runs that differ in the layout alone see the same model and tokens."""

    layout: Layout = field(default_factory=Layout)
    routing: Routing = field(default_factory=Routing)
    steps: int = 2
    micro_batches: int = 4
    """In the whole world; each data-parallel rank gets its share of every step."""
    micro_batch_size: int = 2
    sequence_length: int = 16
    config: Mapping[str, Any] = field(default_factory=dict)
    """Fields of TransformerConfig that differ from this module's."""
    build_config: Callable[[], TransformerConfig] | None = None
    """In place of this module's configuration, and of `config`; of the same layout."""
    model: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of GPTModel that differ from this module's."""
    ddp: Mapping[str, Any] = field(default_factory=dict)
    """Fields of DistributedDataParallelConfig, such as overlap_grad_reduce."""
    optimizer: Mapping[str, Any] = field(default_factory=dict)
    """Fields of OptimizerConfig; SGD by default, as Adam hides the gradient's scale."""
    align_grad_reduce: bool = False
    """Whether schedules start overlapped reductions, as in Megatron's training, and not hooks."""
    tied_embeddings: bool = False
    tokens: Callable[["Run", int, int], Any] = make_tokens
    """The micro-batch [b, s + 1] of a step, by its number in the whole world; or what else
    `forward_step` reads."""
    forward_step: Callable[[Iterator[Any], Any], tuple[torch.Tensor, Any]] | None = None
    """In place of this module's; its reports have a "loss"."""
    spec: Callable[[Any], Any] | None = None
    """Takes the local block spec of a stage and returns the one to use instead."""
    build: Callable[[TransformerConfig, "Run", Callable[[Any], Any] | None], Chunks] | None = None
    """In place of `build_model`."""
    prepare: Callable[[Chunks], None] | None = None
    """Called with the built model chunks before DDP wraps them: to freeze, to change routers."""
    prepare_wrapped: Callable[[list[Any]], None] | None = None
    """Called with the chunks that DDP has wrapped, when the optimizer is built, before a step."""


@dataclass(frozen=True)
class TrainResult:
    """What one rank saw. Losses and norms are those of the whole world, one per step; the norm of
    a step that the optimizer skipped is -1.

    Gradients (after the data-parallel reduction, at the last step), final parameters and buffers
    are this rank's parts, by global name; ``shards`` says which parts of the parameters. The
    optimizer's state is by global name and kind, as "name/exp_avg".
    """

    losses: list[float]
    gradient_norms: list[float]
    gradients: dict[str, torch.Tensor]
    parameters: dict[str, torch.Tensor]
    shards: dict[str, Shard]
    buffers: dict[str, torch.Tensor]
    optimizer_state: dict[str, torch.Tensor]
    observed: Any = None


def train(
    run: Run,
    *,
    transform_spec: Callable[[Any], Any] | None = None,
    transform_model: Callable[[Chunks], Any] | None = None,
    observe: Callable[[Chunks], Any] | None = None,
) -> TrainResult:
    """Train on every rank of an initialised world of ``run.layout.world_size``.

    Args:
        run: what to train.
        transform_spec: takes the block spec of a stage and returns the one to build.
        transform_model: called with the built model chunks, filled, before DDP wraps them.
        observe: called with the model chunks after the last step; its result is returned.
    """
    with use_layout(run.layout):
        config = make_config(run)
        chunks = (run.build or build_model)(config, run, transform_spec)
        if transform_model is not None:
            transform_model(chunks)
        force_routing(chunks, run.routing)
        if run.prepare is not None:
            run.prepare(chunks)
        wrapped = _wrap(chunks, config, run)
        optimizer = _make_optimizer(wrapped, run)
        if run.prepare_wrapped is not None:
            run.prepare_wrapped(wrapped)
        losses, norms = [], []
        for step in range(run.steps):
            for chunk in wrapped:
                chunk.zero_grad_buffer()
            optimizer.zero_grad()
            losses.append(_forward_backward(wrapped, run, step))
            if step == run.steps - 1:
                _gather_gradient_shards(wrapped)
                gradients = {
                    each.name: each.parameter.main_grad.detach().clone()
                    for each in list_parameters(chunks, run.layout)
                    if each.parameter.requires_grad
                }
            _, norm, _ = optimizer.step()
            norms.append(-1.0 if norm is None else float(norm))
        if config.param_sync_func is not None:
            for chunk in wrapped:
                chunk.start_param_sync(force_sync=True)
        named = list_parameters(chunks, run.layout)
        return TrainResult(
            losses,
            norms,
            gradients,
            {each.name: each.parameter.detach().clone() for each in named},
            {each.name: each.shard for each in named},
            {
                f"{stage}.{name}": buffer.detach().clone()
                for stage, chunk in enumerate(chunks)
                for name, buffer in chunk.named_buffers()
            },
            read_optimizer_state(optimizer, named),
            observe(chunks) if observe is not None else None,
        )


def make_config(run: Run) -> TransformerConfig:
    """Configuration of the tiny model: fp32, no dropout, no auxiliary loss, SwiGLU, RMSNorm."""
    if run.build_config is not None:
        return run.build_config()
    layout = run.layout
    settings: dict[str, Any] = {
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "ffn_hidden_size": 64,
        "num_moe_experts": 8,
        "moe_ffn_hidden_size": 64,
        "moe_router_topk": 2,
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "moe_token_dispatcher_type": "alltoall",
        "activation_func": torch.nn.functional.silu,
        "gated_linear_unit": True,
        "add_bias_linear": False,
        "normalization": "RMSNorm",
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "params_dtype": torch.float32,
        "pipeline_dtype": torch.float32,
        "transformer_impl": "local",
        "gradient_accumulation_fusion": False,
        "deallocate_pipeline_outputs": True,
        "tensor_model_parallel_size": layout.tp,
        "sequence_parallel": layout.tp > 1,
        "context_parallel_size": layout.cp,
        "pipeline_model_parallel_size": layout.pp,
        "virtual_pipeline_model_parallel_size": layout.vpp,
        "expert_model_parallel_size": layout.ep,
        "expert_tensor_parallel_size": layout.expert_tp,
        # batch_p2p_comm under interleaved stages is wrong on gloo, without an error.
        "overlap_p2p_comm": layout.vpp is not None,
        "batch_p2p_comm": layout.vpp is None,
    }
    settings |= run.config
    if settings.get("multi_latent_attention"):
        return MLATransformerConfig(**settings)
    return TransformerConfig(**settings)


def build_model(
    config: TransformerConfig, run: Run, transform_spec: Callable[[Any], Any] | None = None
) -> Chunks:
    """This rank's model chunks (one per virtual stage), with the weights of every layout."""
    layout = run.layout
    chunks: Chunks = []
    for stage in range(layout.vpp or 1):
        vp_stage = stage if layout.vpp else None
        block = build_local_block_spec(config, vp_stage=vp_stage)
        if run.spec is not None:
            block = run.spec(block)
        mtp = build_local_mtp_spec(config, block, vp_stage=vp_stage)
        if transform_spec is not None:
            block = transform_spec(block)
        settings: dict[str, Any] = {
            "share_embeddings_and_output_weights": run.tied_embeddings,
            "position_embedding_type": "rope",
        }
        where = {"ignore_virtual": layout.vpp is None, "vp_stage": vp_stage}
        chunk = GPTModel(
            config,
            block,
            vocab_size=VOCABULARY,
            max_sequence_length=run.sequence_length,
            pre_process=parallel_state.is_pipeline_first_stage(**where),
            post_process=parallel_state.is_pipeline_last_stage(**where),
            mtp_block_spec=mtp,
            vp_stage=vp_stage,
            **(settings | dict(run.model)),
        )
        chunk.model_type = ModelType.encoder_or_decoder
        chunks.append(chunk)
    fill_parameters(list_parameters(chunks, layout))
    return chunks


def _wrap(chunks: Chunks, config: TransformerConfig, run: Run) -> list[Any]:
    settings = {
        "grad_reduce_in_fp32": True,
        "num_distributed_optimizer_instances": run.layout.instances,
    }
    ddp_config = DistributedDataParallelConfig(**(settings | dict(run.ddp)))
    wrapped: list[Any]
    if run.optimizer.get("use_layer_wise_distributed_optimizer"):
        from megatron.training.training import wrap_model_chunks_with_ddp

        wrapped = wrap_model_chunks_with_ddp(
            chunks, config, ddp_config, use_layer_wise_distributed_optimizer=True
        )
    else:
        wrapped = [
            DistributedDataParallel(config, ddp_config, chunk, disable_bucketing=index > 0)
            for index, chunk in enumerate(chunks)
        ]

    def unlist(functions: list[Any]) -> Any:
        return functions[0] if len(functions) == 1 else functions

    config.finalize_model_grads_func = finalize_model_grads
    if ddp_config.overlap_grad_reduce:
        config.no_sync_func = unlist([chunk.no_sync for chunk in wrapped])
        if run.align_grad_reduce:
            config.grad_sync_func = unlist([chunk.start_grad_sync for chunk in wrapped])
    if ddp_config.overlap_param_gather:
        config.param_sync_func = unlist([chunk.start_param_sync for chunk in wrapped])
    return wrapped


def _make_optimizer(wrapped: list[Any], run: Run) -> Any:
    settings: dict[str, Any] = {
        "optimizer": "sgd",
        "lr": 0.05,
        "weight_decay": 0.0,
        "sgd_momentum": 0.9,
        # Never reached: with a limit Megatron computes the norm, which is compared.
        "clip_grad": 1e6,
        "use_distributed_optimizer": run.ddp.get("use_distributed_optimizer", False),
        "overlap_param_gather": run.ddp.get("overlap_param_gather", False),
    }
    config = OptimizerConfig(**(settings | dict(run.optimizer)))
    optimizer = get_megatron_optimizer(config, wrapped, use_gloo_process_groups=False)
    wrapped[0].module.config.grad_scale_func = optimizer.scale_loss
    return optimizer


def _forward_backward(wrapped: list[Any], run: Run, step: int) -> float:
    """Run one step's micro-batches and return the mean loss over all ranks."""
    dp = parallel_state.get_data_parallel_world_size()
    assert run.micro_batches % dp == 0
    mine = range(parallel_state.get_data_parallel_rank(), run.micro_batches, dp)

    def iterate() -> Iterator[Any]:
        return iter([run.tokens(run, step, number) for number in mine])

    iterators = [iterate() for _ in wrapped]
    reports = get_forward_backward_func()(
        forward_step_func=run.forward_step or _forward_step,
        data_iterator=iterators if len(wrapped) > 1 else iterators[0],
        model=wrapped if len(wrapped) > 1 else wrapped[0],
        num_microbatches=len(mine),
        seq_length=run.sequence_length,
        micro_batch_size=run.micro_batch_size,
        forward_only=False,
    )
    total = torch.zeros(1, dtype=torch.float64)
    if reports and parallel_state.get_tensor_model_parallel_rank() == 0:
        total += sum(float(report["loss"]) for report in reports)
    dist.all_reduce(total)
    return total.item() / run.micro_batches


def _forward_step(
    iterator: Iterator[torch.Tensor], model: Any, return_schedule_plan: bool = False
) -> tuple[Any, Any]:
    tokens = next(iterator)
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    positions = torch.arange(inputs.shape[1]).expand_as(inputs)
    forward = model.build_schedule_plan if return_schedule_plan else model
    output = forward(inputs, positions, None, labels=labels)
    return output, partial(_compute_loss, model.config.calculate_per_token_loss)


def _compute_loss(per_token: bool, losses: torch.Tensor) -> tuple[Any, ...]:
    """Mean of the token losses [b, s], in the form that Megatron's schedules expect."""
    report = {"loss": losses.detach().mean()}
    if per_token:
        count = torch.tensor(losses.numel(), dtype=torch.int)
        return losses.sum(), count, report
    return losses.mean(), report


def _gather_gradient_shards(wrapped: list[Any]) -> None:
    """Complete main_grad where the distributed optimizer has reduced only this rank's shard."""
    for chunk in wrapped:
        if not chunk.ddp_config.use_distributed_optimizer:
            continue
        for group in chunk.bucket_groups + chunk.expert_parallel_bucket_groups:
            ranks = group.intra_distributed_optimizer_instance_group
            for bucket in group.buckets:
                shard = bucket.grad_data.chunk(ranks.size())[ranks.rank()].clone()
                dist.all_gather_into_tensor(bucket.grad_data, shard, group=ranks)
