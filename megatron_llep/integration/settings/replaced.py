"""What LLEP accepts and does in another way; a notice at start-up says so."""

from typing import Any

from megatron_llep.integration.settings.setting import Setting, has_one_of, has_value


def _switch_off(flag: str, text: str, *, to: object = False, **more: Any) -> Setting:
    """Run without a flag, whose field has its name."""
    name = flag.removeprefix("--").replace("-", "_")
    is_set = has_value(name)
    return Setting(
        verdict="replaced", flag=flag, name=name, is_set=is_set, runs={name: to}, text=text, **more
    )


def _is_padded_by_router(source: Any) -> bool:
    alias = getattr(source, "moe_router_padding_for_fp8", False)
    return bool(source.moe_router_padding_for_quantization or alias)


_ALLTOALL = {
    "moe_token_dispatcher_type": "alltoall",
    # Megatron refuses these two without flex where a configuration is checked again.
    "moe_enable_deepep": False,
    "moe_flex_dispatcher_backend": "deepep",
    "moe_permute_fusion_into_hybridep": False,
}

REPLACED = (
    Setting(
        verdict="replaced",
        title="`--expert-model-parallel-size` 1, or no such flag",
        text="there is nobody to lend to: plain Megatron runs",
    ),
    Setting(
        verdict="replaced",
        flag="--moe-token-dispatcher-type",
        title="`--moe-token-dispatcher-type allgather`, or no such flag",
        name="moe_token_dispatcher_type",
        is_set=has_one_of("moe_token_dispatcher_type", "allgather"),
        runs=_ALLTOALL,
        text="tokens go by all-to-all; with many experts a token, all-gather sends less",
    ),
    Setting(
        verdict="replaced",
        flag="--moe-token-dispatcher-type",
        title="`--moe-token-dispatcher-type flex` (DeepEP, HybridEP, NCCL EP)",
        name="moe_token_dispatcher_type",
        is_set=has_one_of("moe_token_dispatcher_type", "flex"),
        dispatchers=("alltoall",),
        runs=_ALLTOALL,
        text="tokens go by all-to-all; given up are the back end's kernels, which send a token "
        "once to a rank with several of its experts; to keep DeepEP or HybridEP give "
        "--moe-llep-dispatcher flex, to keep NCCL EP leave --moe-llep out",
    ),
    _switch_off(
        "--moe-enable-deepep",
        "without the flex dispatcher DeepEP does not run; to keep it give --moe-llep-dispatcher "
        "flex",
        dispatchers=("alltoall",),
    ),
    _switch_off(
        "--moe-permute-fusion-into-hybridep",
        "LLEP orders tokens before they are exchanged; to keep HybridEP give "
        "--moe-llep-dispatcher flex",
        dispatchers=("alltoall",),
    ),
    _switch_off(
        "--moe-permute-fusion",
        "LLEP's own placement orders the tokens, in kernels of its own on a GPU",
    ),
    Setting(
        verdict="replaced",
        flag="--moe-router-padding-for-quantization",
        title="`--moe-router-padding-for-quantization`, `--moe-router-padding-for-fp8`",
        name="moe_router_padding_for_quantization",
        is_set=_is_padded_by_router,
        runs={"moe_router_padding_for_quantization": False, "moe_router_padding_for_fp8": False},
        text="the routing stays as it is, and rows are padded at the experts, after the plan, as "
        "Megatron does without the flag",
    ),
    Setting(
        verdict="replaced",
        flag="--use-transformer-engine-op-fuser",
        name="use_transformer_engine_op_fuser",
        is_set=has_value("use_transformer_engine_op_fuser"),
        text="routed experts run in Transformer Engine's grouped linears, which lent experts can "
        "enter; the rest of the model keeps its fused operations",
    ),
    _switch_off(
        "--moe-expert-rank-capacity-factor",
        "a rank makes room for the rows of its plan, and drops none, as Megatron in the end, "
        "which runs a step again that has dropped some",
        to=None,
        is_read_by_loop=True,
    ),
    _switch_off(
        "--moe-paged-stash",
        "what experts save for backward stays where it is, and takes as much memory as its "
        "rows need",
    ),
    _switch_off(
        "--overlap-dispatch-backward-with-experts-wgrad",
        "experts compute their weights' gradients within their backward, as those of lent "
        "experts travel home during dispatch",
        is_built_in=True,
    ),
)
"""The op fuser's field of the configuration is left as it is: it says what dense layers run."""
