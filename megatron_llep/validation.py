"""What LLEP refuses, at start-up and by flag: a wrong combination must never train silently."""

import dataclasses
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from megatron.core.transformer.enums import InferenceCudaGraphScope
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_llep.config import LLEPConfig, flag_of
from megatron_llep.experts.grouped_mm import check_convertible
from megatron_llep.experts.kinds import make_lendable
from megatron_llep.experts.quantised import check_restorable
from megatron_llep.experts.unchanged import check_not_sharded
from megatron_llep.integration.graphs import uncapturable
from megatron_llep.planner.cost.presets import get_cost_model

if TYPE_CHECKING:
    from megatron.core.transformer.moe.moe_layer import MoELayer


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """One Megatron setting that LLEP does not support."""

    flag: str
    is_set: Callable[[TransformerConfig], bool]
    value: Callable[[TransformerConfig], object]
    remedy: str


def _field(name: str, flag: str, remedy: str, *, unless: tuple = (None, False)) -> Refusal:
    """Refuse a configuration field unless it has one of the given values."""
    return Refusal(
        flag=flag,
        is_set=lambda config: getattr(config, name, unless[0]) not in unless,
        value=lambda config: getattr(config, name),
        remedy=remedy,
    )


FP8_RECIPES = ("tensorwise", "blockwise", "mxfp8")
"""Those whose quantisers remember nothing from one forward to the next."""

REFUSALS = (
    _field(
        "moe_token_dispatcher_type",
        "--moe-token-dispatcher-type",
        "LLEP extends the all-to-all dispatcher: use --moe-token-dispatcher-type alltoall",
        unless=("alltoall",),
    ),
    _field(
        "moe_expert_capacity_factor",
        "--moe-expert-capacity-factor",
        "LLEP balances instead of dropping tokens: leave the flag out",
    ),
    _field(
        "moe_pad_expert_input_to_capacity",
        "--moe-pad-expert-input-to-capacity",
        "padded experts are equally loaded already: leave the flag out",
    ),
    _field(
        "moe_permute_fusion",
        "--moe-permute-fusion",
        "LLEP has a permutation of its own: leave the flag out",
    ),
    _field(
        "moe_router_padding_for_quantization",
        "--moe-router-padding-for-quantization",
        "it pads after the plan is made: leave the flag out",
    ),
    Refusal(
        flag="--fp8-recipe",
        is_set=lambda config: bool(config.fp8) and config.fp8_recipe not in FP8_RECIPES,
        value=lambda config: config.fp8_recipe,
        remedy="it may keep a history of every slot, and experts change slots: use --fp8-recipe "
        "tensorwise, blockwise or mxfp8",
    ),
    Refusal(
        flag="--fp8-param-gather",
        is_set=lambda config: bool(config.fp8_param) and config.fp8_recipe != "blockwise",
        value=lambda config: f"with --fp8-recipe {config.fp8_recipe}",
        remedy="a borrower could not restore what the parameters hold: use --fp8-recipe "
        "blockwise, or leave the flag out",
    ),
    _field(
        "fp4", "--fp4-format", "lent experts are not quantised to it: use FP8, bf16, fp16, fp32"
    ),
    _field(
        "quant_recipe",
        "--te-precision-config-file",
        "what it does to lent experts is untested: leave the flag out",
    ),
    _field(
        "moe_single_grouped_weight",
        "--moe-single-grouped-weight",
        "one tensor of all experts cannot take in foreign ones: leave the flag out",
    ),
    _field(
        "moe_single_grouped_bias",
        "--moe-single-grouped-bias",
        "one tensor of all experts cannot take in foreign ones: leave the flag out",
    ),
    _field(
        "expert_gtp_weight_remat_size",
        "--expert-tensor-parallel-num-weight-shards",
        "it shards the expert weights that LLEP lends: leave the flag out",
        unless=(None, 1),
    ),
    _field(
        "overlap_dispatch_backward_with_experts_wgrad",
        "--overlap-dispatch-backward-with-experts-wgrad",
        "gradients of lent experts would leave before they are computed: leave the flag out",
    ),
    _field(
        "cuda_graph_impl",
        "--cuda-graph-impl",
        "plans are made on the host, within an iteration: use --cuda-graph-impl transformer_engine",
        unless=("none", None, "local", "transformer_engine"),
    ),
    Refusal(
        flag="--cuda-graph-modules",
        is_set=lambda config: bool(uncapturable(config)),
        value=uncapturable,
        remedy="plans are made on the host, so graphs must not hold the experts: leave it out and "
        "name others of attn, mlp, mamba and, with --cuda-graph-impl transformer_engine, "
        "moe_router",
    ),
    Refusal(
        flag="--inference-cuda-graph-scope",
        is_set=lambda config: (
            config.inference_cuda_graph_scope in (InferenceCudaGraphScope.block, "block")
        ),
        value=lambda config: getattr(
            config.inference_cuda_graph_scope, "name", config.inference_cuda_graph_scope
        ),
        remedy="its graphs hold the experts: use --inference-cuda-graph-scope layer",
    ),
    _field(
        "transformer_impl",
        "--transformer-impl",
        "its layers have token dispatchers of their own: use --transformer-impl "
        "transformer_engine or local",
        unless=("transformer_engine", "local"),
    ),
    _field(
        "moe_pad_experts_for_cuda_graph_inference",
        "--moe-pad-experts-for-cuda-graph-inference",
        "Megatron's inference then drops and pads tokens after the start: leave the flag out",
    ),
    _field(
        "hybrid_context_parallel",
        "--hybrid-context-parallel",
        "ranks that share tokens would run unlike numbers of forwards: leave the flag out",
    ),
    _field(
        "moe_latent_size",
        "--moe-latent-size",
        "lending latent experts is untested: leave the flag out",
    ),
    _field(
        "use_transformer_engine_op_fuser",
        "--use-transformer-engine-op-fuser",
        "its fused operations have fixed weights: leave the flag out",
    ),
    _field(
        "cpu_offloading",
        "--cpu-offloading-num-layers",
        "it moves whatever a layer saves, lent weights too: leave the flag out, or "
        "use --fine-grained-activation-offloading",
    ),
    _field(
        "moe_expert_rank_capacity_factor",
        "--moe-expert-rank-capacity-factor",
        "LLEP balances instead of dropping tokens: leave the flag out",
    ),
    _field(
        "moe_paged_stash",
        "--moe-paged-stash",
        "it needs tokens to be dropped above a capacity: leave the flag out",
    ),
)


def check_config(config: TransformerConfig, llep: LLEPConfig) -> None:
    """Check a model's configuration before it is built.

    Raises:
        ValueError: names flag, value and remedy.
    """
    ep_size, num_experts = config.expert_model_parallel_size, config.num_moe_experts
    if not num_experts:
        raise ValueError("--moe-llep needs experts: set --num-experts, or leave --moe-llep out")
    if ep_size < 2:
        raise ValueError(
            f"--expert-model-parallel-size {ep_size}: with one expert-parallel rank there is "
            "nobody to lend to; use 2 or more, or leave --moe-llep out"
        )
    if num_experts % ep_size:
        raise ValueError(
            f"--num-experts {num_experts}: must be a multiple of "
            f"--expert-model-parallel-size {ep_size}"
        )
    native = num_experts // ep_size
    if llep.max_foreign_experts is not None and llep.max_foreign_experts > native:
        raise ValueError(
            f"--moe-llep-max-foreign-experts {llep.max_foreign_experts}: a rank hosts {native} "
            f"experts (--num-experts {num_experts} / --expert-model-parallel-size {ep_size}) and "
            "may borrow at most as many"
        )
    for refusal in REFUSALS:
        if refusal.is_set(config):
            raise ValueError(
                f"{refusal.flag} {refusal.value(config)}: not supported with --moe-llep; "
                f"{refusal.remedy}"
            )


def check_layer(layer: "MoELayer", llep: LLEPConfig) -> None:
    """Check a built MoE layer.

    Raises:
        ValueError: names what does not fit and the way out.
    """
    check_config(layer.config, llep)
    check_not_sharded(layer.experts)
    if llep.expert_gemm == "grouped_mm":
        check_convertible(layer.experts)
    experts = make_lendable(layer.experts)
    if layer.config.fp8 and not experts.runs_in_fp8:
        raise ValueError(
            f"--fp8-format {layer.config.fp8}: not supported with --moe-llep for experts of "
            f"{type(layer.experts).__name__}; use --moe-grouped-gemm with Transformer Engine, or "
            "train in bf16, fp16 or fp32"
        )
    check_restorable(layer.experts)
    dtypes = {weight.dtype for weight in layer.experts.parameters()}
    if len(dtypes) > 1:
        raise ValueError(
            f"--moe-llep: expert weights of several dtypes ({', '.join(map(str, dtypes))}) "
            "cannot travel in one buffer; use one dtype"
        )


def check_same_on_all_ranks(llep: LLEPConfig, group: dist.ProcessGroup | None = None) -> None:
    """Check that all ranks of the group have the same settings; all of them must call it.

    Args:
        llep: this rank's settings.
        group: default: all ranks.

    Raises:
        ValueError: names the flags that differ, with each rank's value; on every rank.
    """
    settings = _describe(llep)
    digest = hashlib.sha256(repr(settings).encode()).digest()[:8]
    mine = torch.tensor([int.from_bytes(digest, "big", signed=True)])
    if torch.cuda.is_available():
        mine = mine.cuda()
    digests = mine.new_empty(dist.get_world_size(group))
    dist.all_gather_into_tensor(digests, mine, group=group)
    if (digests == mine).all():
        return
    everyone: list = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, settings, group=group)
    differing = {
        name: [each[name] for each in everyone]
        for name in everyone[0]
        if len({each[name] for each in everyone}) > 1
    }
    lines = "; ".join(f"{flag_of(name)}: {values}" for name, values in differing.items())
    raise ValueError(f"LLEP settings differ between ranks, give all the same: {lines}")


def refuse_on_all_ranks(refusal: str | None) -> None:
    """Raise on every rank if any rank refuses something; all of them must call it.

    So none of them goes on to wait for one that has stopped.

    Args:
        refusal: what this rank refuses, where, and the way out; None if nothing.

    Raises:
        ValueError: the first rank's refusal, and which ranks refuse.
    """
    refusals: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(refusals, refusal)
    ranks = [rank for rank, each in enumerate(refusals) if each is not None]
    if ranks:
        others = f"; so do ranks {ranks[1:]}" if ranks[1:] else ""
        raise ValueError(f"{refusals[ranks[0]]}: rank {ranks[0]} refuses it{others}")


def _describe(llep: LLEPConfig) -> dict[str, object]:
    """All settings by field; a cost model with a hash of its numbers, or why it cannot be read."""
    settings = dataclasses.asdict(llep)
    if llep.cost_model is not None:
        try:
            found = get_cost_model(llep.cost_model).digest()
        except ValueError as error:  # told by all ranks together, not by one while others wait
            found = str(error)
        settings["cost_model"] = f"{llep.cost_model} ({found})"
    return settings
