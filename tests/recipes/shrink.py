"""A published recipe, made small enough to train on a CPU in a second."""

import math

from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

from megatron_llep.offline.launch.flags import Flags
from megatron_llep.training.cpu_flags import CPU_FLAGS
from support.layout import Layout

# Beginnings of flags that a small model on a CPU goes without -> what is given up with them.
# Empty: nothing that a reader would miss.
LEFT_OUT: dict[str, tuple[str, ...]] = {
    "linear attention, replaced by ordinary attention": (
        "--linear-",
        "--experimental-attention-variant",
        "--attention-output-gate",
        "--apply-layernorm-1p",
        "--no-weight-decay-cond-type",
    ),
    "Mamba layers, replaced by attention": ("--mamba-",),
    "FP8": ("--fp8-", "--first-last-layers-bf16", "--reuse-grad-buf-for-mxfp8-param-ag"),
    "padding for FP8": ("--moe-router-padding-for",),
    "fused expert kernels": (
        "--moe-grouped-gemm",
        "--moe-permute-fusion",
        "--moe-router-fusion",
        "--use-fused-weighted-squared-relu",
        "--use-transformer-engine-op-fuser",
    ),
    "DeepEP or HybridEP": (
        "--moe-enable-deepep",
        "--moe-flex-",
        "--moe-hybridep-",
        "--moe-deepep-",
    ),
    "expert-parallel overlap": ("--overlap-moe-expert-parallel-comm", "--delay-wgrad-compute"),
    "tensor-parallel overlap": ("--tp-comm-overlap",),
    "CUDA graphs": ("--cuda-graph-", "--te-rng-tracker"),
    "offloading": (
        "--fine-grained-activation-offloading",
        "--offload-modules",
        "--optimizer-cpu-offload",
        "--overlap-cpu-optimizer-",
    ),
    "Megatron-FSDP": (
        "--use-megatron-fsdp",
        "--megatron-fsdp-",
        "--data-parallel-sharding-strategy",
        "--outer-dp-sharding-strategy",
    ),
    "Muon, replaced by Adam": ("--muon-", "--no-use-layer-wise-param-layout"),
    "optimizer state in less precision": (
        "--use-precision-aware-optimizer",
        "--main-grads-dtype",
        "--main-params-dtype",
        "--exp-avg-",
    ),
    "": (
        "--bf16",
        "--fp16",
        "--attention-backend",
        "--cross-entropy-",
        "--rotary-scaling-factor",
        "--mscale",
        "--make-vocab-size-divisible-by",
        "--padded-vocab-size",
        "--pipeline-model-parallel-layout",
        "--num-layers-per-virtual-pipeline-stage",
        "--account-for-",
        "--disable-gloo-process-groups",
        "--check-weight-hash-across-dp-replicas-interval",
    ),
}
_GPU_RECOMPUTE = {"layernorm", "moe_act"}
_MOST_RANKS = 8
_MOST_CHUNKS = 2
_SIZES = {
    "ep": "--expert-model-parallel-size",
    "pp": "--pipeline-model-parallel-size",
    "tp": "--tensor-model-parallel-size",
    "cp": "--context-parallel-size",
    "etp": "--expert-tensor-parallel-size",
}
_WIDTHS: Flags = {
    "--hidden-size": 32,
    "--ffn-hidden-size": 64,
    "--moe-ffn-hidden-size": 32,
    "--moe-shared-expert-intermediate-size": 32,
    "--moe-latent-size": 16,
    "--num-attention-heads": 8,
    "--kv-channels": 4,
    "--num-query-groups": 2,
    "--q-lora-rank": 16,
    "--kv-lora-rank": 12,
    "--qk-head-dim": 4,
    "--qk-pos-emb-head-dim": 4,
    "--v-head-dim": 6,
    "--window-size": "4,0",
    "--seq-length": 16,
    "--max-position-embeddings": 16,
    "--micro-batch-size": 2,
}


def shrink(flags: Flags) -> Flags:
    """The flags of a small model that is routed, laid out and optimized as the recipe's.

    Kept: top-k, groups of experts, score function, expert bias, auxiliary losses, shared and latent
    experts, which layers are dense, latent attention, windows and sinks, multi-token prediction,
    recompute where a CPU can, optimizer and its overlap, the order of ranks.

    Changed: widths to `_WIDTHS`, if the recipe gives them; one layer to a model chunk, at most two
    chunks to a pipeline stage, of a pattern its first four layers; the largest parallel size halved
    until 8 ranks do; experts to the least number that keeps top-k a choice; the dispatcher to the
    all-to-all one. What `LEFT_OUT` lists goes, 16-bit numbers among it.
    """
    left_out = tuple(start for starts in LEFT_OUT.values() for start in starts)
    small = {flag: value for flag, value in flags.items() if not flag.startswith(left_out)}
    small |= {flag: value for flag, value in _WIDTHS.items() if flag in small}
    small |= _shrink_layout(flags)
    layout = read_layout(small)
    if "--num-query-groups" in small:
        small["--num-query-groups"] = max(2, layout.tp)
    if "--hybrid-layer-pattern" in flags:
        small |= _shrink_pattern(flags, layout)
    else:
        small |= _shrink_depth(flags, layout)
    small |= _shrink_experts(flags, layout)
    small |= _keep_recompute(flags)
    small |= {each.flag: each.value or True for each in CPU_FLAGS}
    return small | {
        "--moe-token-dispatcher-type": "alltoall",
        "--optimizer": "sgd" if flags.get("--optimizer") == "sgd" else "adam",
        "--global-batch-size": 2 * layout.data_parallel * max(2, layout.pp),
        "--tokenizer-type": "NullTokenizer",
        "--vocab-size": 63,  # one more is the end of a document
        "--make-vocab-size-divisible-by": 1,
        "--mock-data": True,
        "--lr": 1e-3,
        "--train-iters": 3,
        "--eval-interval": 1000,
        "--eval-iters": 0,
    }


def read_layout(flags: Flags) -> Layout:
    """The layout of a recipe, on as few ranks as it can be."""
    sizes = _read_sizes(flags)
    chunks = int(str(flags.get("--num-virtual-stages-per-pipeline-rank", 1)))
    instances = int(str(flags.get("--num-distributed-optimizer-instances", 1)))
    least = Layout(**sizes).data_parallel
    return Layout(
        **sizes,
        vpp=chunks if chunks > 1 else None,
        dp=least * instances,
        instances=instances,
        pp_before_dp=bool(flags.get("--use-tp-pp-dp-mapping")),
    )


def name_given_up(flags: Flags) -> list[str]:
    """What a recipe loses when it is shrunk, besides size; in words."""
    return [
        what
        for what, starts in LEFT_OUT.items()
        if what and any(value and flag.startswith(starts) for flag, value in flags.items())
    ]


def _read_sizes(flags: Flags) -> dict[str, int]:
    return {name: int(str(flags[flag])) for name, flag in _SIZES.items() if flag in flags}


def _shrink_layout(flags: Flags) -> Flags:
    """Halve the largest size, the first of `_SIZES` among equals, until the world is small."""
    sizes = _read_sizes(flags)
    while Layout(**sizes).world_size > _MOST_RANKS:
        largest = max(sizes, key=lambda name: sizes[name])
        sizes[largest] //= 2
    return {_SIZES[name]: size for name, size in sizes.items()}


def _shrink_depth(flags: Flags, layout: Layout) -> Flags:
    """One layer in each model chunk, two at least, and one dense layer where there were some."""
    chunks = min(_count_chunks(flags), _MOST_CHUNKS) if layout.pp > 1 else 1
    layers = max(2, layout.pp * chunks)
    small: Flags = {"--num-layers": layers}
    if chunks > 1:
        small["--num-virtual-stages-per-pipeline-rank"] = chunks
    if str(flags.get("--moe-layer-freq", "")).startswith("([0]"):
        small["--moe-layer-freq"] = f"([0]*1+[1]*{layers - 1})"
    return small


def _shrink_pattern(flags: Flags, layout: Layout) -> Flags:
    """The first layers of a hybrid model, and its depths of multi-token prediction."""
    assert layout.pp == 1, "where stages end has not been needed"
    layers = str(flags["--hybrid-layer-pattern"])[:4].replace("M", "*")
    depths = int(str(flags.get("--mtp-num-layers", 0)))
    return {"--hybrid-layer-pattern": layers + "/*E" * depths}


def _count_chunks(flags: Flags) -> int:
    """Model chunks of a pipeline stage."""
    stages = int(str(flags.get("--pipeline-model-parallel-size", 1)))
    layout = flags.get("--pipeline-model-parallel-layout")
    if layout:
        return len(PipelineParallelLayerLayout.parse_str_to_list(str(layout))) // stages
    layers = flags.get("--num-layers-per-virtual-pipeline-stage")
    if layers:
        return math.ceil(int(str(flags["--num-layers"])) / stages / int(str(layers)))
    return int(str(flags.get("--num-virtual-stages-per-pipeline-rank", 1)))


def _shrink_experts(flags: Flags, layout: Layout) -> Flags:
    """Twice top-k, or two a rank, if that is more, in whole groups and as many on each rank."""
    whole = math.lcm(layout.ep, int(str(flags.get("--moe-router-num-groups", 1))))
    wanted = max(2 * int(str(flags.get("--moe-router-topk", 2))), 2 * layout.ep)
    most = int(str(flags["--num-experts"]))
    return {"--num-experts": min(most, math.ceil(wanted / whole) * whole)}


def _keep_recompute(flags: Flags) -> Flags:
    """Without the modules that only Transformer Engine recomputes; with none left, no recompute."""
    modules = flags.get("--recompute-modules")
    if not isinstance(modules, list):
        return {}
    kept = [name for name in modules if name not in _GPU_RECOMPUTE]
    if kept:
        return {"--recompute-modules": kept}
    return {"--recompute-modules": None, "--recompute-granularity": None}
