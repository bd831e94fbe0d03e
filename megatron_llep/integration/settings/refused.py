"""What LLEP refuses at start-up: a wrong combination must never train silently."""

from typing import Any

from megatron.core.transformer.enums import InferenceCudaGraphScope

from megatron_llep.integration.graphs import uncapturable
from megatron_llep.integration.settings.setting import Setting, has_value

FP8_RECIPES = ("tensorwise", "blockwise", "mxfp8")
"""Those whose quantisers remember nothing from one forward to the next."""

_SHARDED = "it shards the expert weights that LLEP lends; use Megatron's DDP with "
_SAVED = (
    "what foreign experts compute would be saved under native experts' names; leave the flag out"
)


def _refuse(name: str, flag: str, text: str, *, unless: tuple = (None, False)) -> Setting:
    """Refuse a field unless it has one of the given values."""
    is_set = has_value(name, unless=unless)
    return Setting(verdict="refused", flag=flag, name=name, is_set=is_set, text=text)


def _has_history(source: Any) -> bool:
    return bool(source.fp8) and source.fp8_recipe not in FP8_RECIPES


def _drops_tokens(source: Any) -> bool:
    factor = source.moe_expert_capacity_factor
    return factor is not None and factor >= 0  # below, Megatron drops none


def _graphs_whole_blocks(source: Any) -> bool:
    return source.inference_cuda_graph_scope in (InferenceCudaGraphScope.block, "block")


def _is_fp8_without_grouped_gemm(source: Any) -> bool:
    return bool(source.fp8) and not source.moe_grouped_gemm


_CONFIGURATION = (
    Setting(
        verdict="refused",
        flag="--moe-expert-capacity-factor",
        name="moe_expert_capacity_factor",
        is_set=_drops_tokens,
        text="LLEP balances instead of dropping tokens: leave the flag out",
    ),
    _refuse(
        "moe_pad_expert_input_to_capacity",
        "--moe-pad-expert-input-to-capacity",
        "padded experts are equally loaded already: leave the flag out",
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
        "quant_recipe",
        "--te-precision-config-file",
        "its file may choose for experts what --fp8-recipe is refused for: leave the flag out, and "
        "choose one recipe with --fp8-format and --fp8-recipe",
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
    ),
    _refuse(
        "overlap_dispatch_backward_with_experts_wgrad",
        "--overlap-dispatch-backward-with-experts-wgrad",
        "gradients of lent experts would leave before they are computed: leave the flag out",
    ),
    _refuse(
        "cuda_graph_impl",
        "--cuda-graph-impl",
        "plans are made on the host, within an iteration: use --cuda-graph-impl transformer_engine",
        unless=("none", None, "local", "transformer_engine"),
    ),
    Setting(
        verdict="refused",
        flag="--cuda-graph-modules",
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
    _refuse(
        "cpu_offloading",
        "--cpu-offloading-num-layers",
        "it moves whatever a layer saves, lent weights too: leave the flag out, or use "
        "--fine-grained-activation-offloading",
    ),
    _refuse(
        "moe_expert_rank_capacity_factor",
        "--moe-expert-rank-capacity-factor",
        "LLEP balances instead of dropping tokens: leave the flag out",
    ),
    _refuse(
        "moe_paged_stash",
        "--moe-paged-stash",
        "it needs tokens to be dropped above a capacity: leave the flag out",
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

REFUSED = _CONFIGURATION + _ARGUMENTS
