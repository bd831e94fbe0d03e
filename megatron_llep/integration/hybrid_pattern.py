"""What is refused of a `--hybrid-layer-pattern`, before anything is built of it.

Megatron finds the same out rank by rank, some of it in assertions and some when a layer is built.
"""

import importlib.util
from argparse import Namespace
from collections.abc import Iterator

_FLAG = "--hybrid-layer-pattern"
_EXPERTS, _SPARSE_ATTENTION, _PIPE = "E", "D", "|"
# Of symbols whose kernels are no part of Megatron: what the layer is, and its package.
_PACKAGES = {
    "M": ("Mamba", "mamba_ssm", "mamba-ssm"),
    "G": ("a gated delta net", "fla", "flash-linear-attention"),
}
_FIRST, _LAST = "decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers"


def read_pattern(args: Namespace) -> str | None:
    """The pattern, also under Megatron's older flag; None of a GPT model."""
    flags = ("hybrid_layer_pattern", "hybrid_override_pattern")
    return next((value for flag in flags if (value := getattr(args, flag, None))), None)


def refuse_pattern(args: Namespace) -> Iterator[str]:
    """What no machine can train: flag, value, reason and way out of each.

    Args:
        args: parsed, LLEP's flags among them.
    """
    pattern = read_pattern(args)
    if pattern is None:
        return
    # Of Megatron's modules that are for these models alone.
    from megatron.core.models.hybrid.hybrid_layer_allocation import parse_hybrid_pattern

    what = f"{_FLAG} {pattern}"
    try:
        parsed = parse_hybrid_pattern(pattern)
    except ValueError as error:
        yield f"{what}: {error}"
        return
    segments = (parsed.main_pattern or "").split(_PIPE)
    layers = "".join(segments) + (parsed.mtp_pattern or "")
    if not any(segments):
        yield f"{what}: it names no layer; give one symbol a layer, such as *E*E"
    yield from _refuse_segments(args, what, segments)
    if _EXPERTS in layers and not args.num_experts:
        yield f"{what}: {_EXPERTS} is a layer of experts; set --num-experts, or leave it out"
    if args.moe_llep and _EXPERTS not in layers:
        yield (
            f"{what}: no layer has experts, so there is nothing to lend; write {_EXPERTS} where "
            "one has them, or leave --moe-llep out"
        )
    if args.overlap_moe_expert_parallel_comm:
        yield (
            "--overlap-moe-expert-parallel-comm: Megatron cuts only GPT models into the steps that "
            "it needs; leave the flag out"
        )


def refuse_kernels(args: Namespace, *, has_gpu: bool) -> Iterator[str]:
    """What this machine cannot train, as refused by `refuse_pattern`.

    Args:
        args: parsed.
        has_gpu: whether there is a GPU.
    """
    pattern = read_pattern(args) or ""
    what = f"{_FLAG} {pattern}"
    for symbol, (layer, module, package) in _PACKAGES.items():
        if symbol not in pattern:
            continue
        way_out = f"use a pattern without {symbol}, such as {pattern.replace(symbol, '*')}"
        if not has_gpu:
            yield f"{what}: {symbol} is {layer}, whose kernels need a GPU; {way_out} here"
        elif importlib.util.find_spec(module) is None:
            yield (
                f"{what}: {symbol} is {layer}, whose kernels are in the package {package}, which "
                f"is not installed; pip install {package}, or {way_out}"
            )
    if _SPARSE_ATTENTION in pattern and args.transformer_impl == "local":
        yield (
            f"{what}: {_SPARSE_ATTENTION} is sparse attention, which needs Transformer Engine; "
            f"use a pattern without {_SPARSE_ATTENTION}, or --transformer-impl "
            "transformer_engine"
        )


def _refuse_segments(args: Namespace, what: str, segments: list[str]) -> Iterator[str]:
    """Whether the segments spread over the stages of the pipeline."""
    stages = args.pipeline_model_parallel_size
    size = f"--pipeline-model-parallel-size {stages}"
    if len(segments) > 1:
        if stages == 1:
            yield (
                f"{what}: {len(segments)} segments are stages of a pipeline, and there is one; set "
                f"--pipeline-model-parallel-size, or leave {_PIPE} out"
            )
        elif len(segments) % stages:
            yield (
                f"{what}: {len(segments)} segments do not spread over {size}; give each stage as "
                f"many, by {_PIPE} between them"
            )
        return
    is_uneven = getattr(args, _FIRST) is not None or getattr(args, _LAST) is not None
    if len(segments[0]) % stages and not is_uneven:
        yield (
            f"{what}: {len(segments[0])} layers do not divide over {size}; say with "
            f"{_PIPE} where each stage ends"
        )
