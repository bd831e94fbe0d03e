"""What LLEP refuses at start-up: a wrong combination must never train silently."""

from typing import Any

from megatron.core.transformer.enums import InferenceCudaGraphScope

from megatron_llep.compat import MEGATRON
from megatron_llep.compat.settings import refused_by
from megatron_llep.integration.graphs import uncapturable
from megatron_llep.integration.settings.setting import Setting, has_value

FP8_RECIPES = ("tensorwise", "blockwise", "mxfp8")
"""Those whose quantisers remember nothing from one forward to the next."""

_SHARDED = "it shards the expert weights that LLEP lends; use Megatron's DDP with "
_SAVED = (
    "what foreign experts compute would be saved under native experts' names; leave the flag out"
)


def _refuse(
    name: str, flag: str, text: str, *, unless: tuple = (None, False), title: str = ""
) -> Setting:
    """Refuse a field unless it has one of the given values."""
    is_set = has_value(name, unless=unless)
    return Setting(verdict="refused", flag=flag, title=title, name=name, is_set=is_set, text=text)


def _has_history(source: Any) -> bool:
    return bool(source.fp8) and source.fp8_recipe not in FP8_RECIPES


def _graphs_whole_blocks(source: Any) -> bool:
    return source.inference_cuda_graph_scope in (InferenceCudaGraphScope.block, "block")


def _is_fp8_without_grouped_gemm(source: Any) -> bool:
    return bool(source.fp8) and not source.moe_grouped_gemm


def _offloads_single_experts(source: Any) -> bool:
    return bool(source.cpu_offloading) and not source.moe_grouped_gemm


_CONFIGURATION = (
    _refuse(
        "moe_pad_expert_input_to_capacity",
        "--moe-pad-expert-input-to-capacity",
        "padded experts are equally loaded, so there is nothing to lend: leave the flag out",
    ),
    Setting(
        verdict="refused",
        flag="--fp8-format",
        title="`--fp8-format` without `--moe-grouped-gemm`, or with `SequentialMLP`",
        name="fp8",
        is_set=_is_fp8_without_grouped_gemm,
        text="LLEP does not lend quantised experts of SequentialMLP; use --moe-grouped-gemm with "
        "Transformer Engine, or train in bf16, fp16 or fp32",
    ),
    Setting(
        verdict="refused",
        flag="--fp8-recipe",
        title="`--fp8-format` with `--fp8-recipe delayed` (Megatron's default) or `custom`",
        name="fp8_recipe",
        is_set=_has_history,
        text="it may keep a history of every slot, and experts change slots: use --fp8-recipe "
        "tensorwise, blockwise or mxfp8",
    ),
    _refuse(
        "fp4",
        "--fp4-format",
        "lent experts are not quantised to it: use FP8, bf16, fp16, fp32",
    ),
    _refuse(
        "moe_single_grouped_weight",
        "--moe-single-grouped-weight",
        "one tensor of all experts cannot take in foreign ones: leave the flag out",
    ),
    _refuse(
        "moe_single_grouped_bias",
        "--moe-single-grouped-bias",
        "one tensor of all experts cannot take in foreign ones: leave the flag out",
    ),
    _refuse(
        "expert_gtp_weight_remat_size",
        "--expert-tensor-parallel-num-weight-shards",
        "it shards the expert weights that LLEP lends: leave the flag out",
        unless=(None, 1),
        title="`--expert-tensor-parallel-num-weight-shards` above `--expert-tensor-parallel-size`",
    ),
    _refuse(
        "cuda_graph_impl",
        "--cuda-graph-impl",
        "plans are made on the host, within an iteration: use --cuda-graph-impl transformer_engine",
        unless=("none", None, "local", "transformer_engine"),
        title="`--cuda-graph-impl full_iteration`",
    ),
    Setting(
        verdict="refused",
        flag="--cuda-graph-modules",
        title="`--cuda-graph-impl transformer_engine` or `local` without `--cuda-graph-modules`, "
        "or with `moe` among them; `local` with `moe_router` or `moe_preprocess`",
        name="cuda_graph_modules",
        is_set=lambda source: bool(uncapturable(source)),
        value=uncapturable,
        text="plans are made on the host, so graphs must not hold the experts: leave it out and "
        "name others of attn, mlp, mamba and, with --cuda-graph-impl transformer_engine, "
        "moe_router",
    ),
    Setting(
        verdict="refused",
        flag="--inference-cuda-graph-scope",
        title="`--inference-cuda-graph-scope block`",
        name="inference_cuda_graph_scope",
        is_set=_graphs_whole_blocks,
        value=lambda source: "block",
        text="its graphs hold the experts: use --inference-cuda-graph-scope layer",
    ),
    _refuse(
        "transformer_impl",
        "--transformer-impl",
        "its layers have token dispatchers of their own: use --transformer-impl "
        "transformer_engine or local",
        unless=("transformer_engine", "local"),
        title="`--transformer-impl inference_optimized`",
    ),
    _refuse(
        "moe_pad_experts_for_cuda_graph_inference",
        "--moe-pad-experts-for-cuda-graph-inference",
        "Megatron's inference then drops and pads tokens after the start: leave the flag out",
    ),
    _refuse(
        "hybrid_context_parallel",
        "--hybrid-context-parallel",
        "ranks that share tokens would run unlike numbers of forwards: leave the flag out",
    ),
    Setting(
        verdict="refused",
        flag="--cpu-offloading-num-layers",
        title="`--cpu-offloading-num-layers` without `--moe-grouped-gemm`",
        name="cpu_offloading",
        is_set=_offloads_single_experts,
        text="it moves whatever a layer saves, lent weights too: use --moe-grouped-gemm, whose "
        "linears keep their weights where they are, or leave the flag out",
    ),
)

_ARGUMENTS = (
    _refuse("use_megatron_fsdp", "--use-megatron-fsdp", _SHARDED + "--use-distributed-optimizer"),
    _refuse("use_torch_fsdp2", "--use-torch-fsdp2", _SHARDED + "--use-distributed-optimizer"),
    _refuse(
        "overlap_param_gather_with_optimizer_step",
        "--overlap-param-gather-with-optimizer-step",
        "Megatron 0.19 gathers the experts of a stage's first chunk before their optimizer has "
        "stepped, and their replicas drift apart; leave the flag out",
    ),
    _refuse("save_activations_interval", "--save-activations-interval", _SAVED),
    _refuse("save_dgrads_interval", "--save-dgrads-interval", _SAVED),
    _refuse(
        "save_tokens_per_expert_interval",
        "--save-tokens-per-expert-interval",
        "it would save the tokens of slots, and not of experts; use --moe-routing-trace-path",
    ),
    _refuse(
        "fake_process_group",
        "--fake-process-group",
        "plans are made from counts that are exchanged; leave the flag out",
    ),
)
"""Of these only Megatron's arguments know."""

_NEW = tuple(_refuse(*each) for each in refused_by(MEGATRON))

REFUSED = _CONFIGURATION + _NEW + _ARGUMENTS
