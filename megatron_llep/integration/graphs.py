"""CUDA graphs beside LLEP: what Megatron may capture while plans are made on the host.

Megatron captures parts of layers (`--cuda-graph-modules`) and runs the rest as ever. Attention,
dense MLPs and Mamba layers hold nothing of LLEP. `moe_router` ends where Megatron's router has
chosen: what LLEP does then runs on the replayed graph's outputs, so it may be captured too.
`moe_preprocess` counts and lays out tokens for plain expert parallelism, which LLEP replaces; it is
taken out. `moe` and whole layers hold the experts and are refused. Where nothing is left to
capture, nothing is captured: an empty list would be that of whole layers.

Megatron's own graphs (`--cuda-graph-impl local`) do not divide the router from what follows it.
"""

from typing import Any

from megatron.core.transformer.enums import CudaGraphModule


def kept_in_graphs(config: Any) -> list[CudaGraphModule]:
    """The modules of `config.cuda_graph_modules` that are still to be captured with LLEP.

    Args:
        config: a `TransformerConfig`, or arguments that have its fields.
    """
    modules = _modules(config)
    if config.cuda_graph_impl != "transformer_engine":
        return modules
    if CudaGraphModule.moe_preprocess not in modules:
        return modules
    taken_out = {CudaGraphModule.moe_preprocess}
    if "layernorm" in _recomputed(config):
        # A graph that ends with the router would keep the norm's output, and Megatron would not
        # recompute it.
        taken_out.add(CudaGraphModule.moe_router)
    return [module for module in modules if module not in taken_out]


def uncapturable(config: Any) -> str:
    """What of `--cuda-graph-modules` cannot be captured with LLEP, in words; empty if all can."""
    if config.cuda_graph_impl not in ("local", "transformer_engine"):
        return ""
    if not _modules(config):
        return "of whole layers"
    allowed = {CudaGraphModule.attn, CudaGraphModule.mlp, CudaGraphModule.mamba}
    if config.cuda_graph_impl == "transformer_engine":
        allowed.add(CudaGraphModule.moe_router)
    kept = kept_in_graphs(config)
    return " ".join(module.name for module in kept if module not in allowed)


def keep_planning_out_of_graphs(config: Any) -> None:
    """Take out of `config.cuda_graph_modules` what LLEP must do outside of graphs, in place.

    In place, as Megatron's layers may hold copies of the configuration which share the list. Where
    nothing is left, `config.cuda_graph_impl` becomes "none". A training loop that reads a field of
    its own has to be told: Megatron's reads its arguments.
    """
    if _is_left_without_graphs(config):
        # A list of its own: to a copy that shared an emptied one it would mean whole layers.
        config.cuda_graph_impl, config.cuda_graph_modules = "none", []
    elif config.cuda_graph_impl == "transformer_engine":
        config.cuda_graph_modules[:] = kept_in_graphs(config)


def notices(config: Any) -> list[str]:
    """What `keep_planning_out_of_graphs` changes, a line each, for the user to read."""
    kept = kept_in_graphs(config)
    taken_out = [module.name for module in _modules(config) if module not in kept]
    if not taken_out:
        return []
    line = (
        f"--cuda-graph-modules: {' and '.join(taken_out)} taken out, as LLEP plans on the host "
        "between router and dispatch"
    )
    if _is_left_without_graphs(config):
        line += "; nothing else was to be captured, so no graphs are (--cuda-graph-impl none)"
    return [line]


def _is_left_without_graphs(config: Any) -> bool:
    """Whether what is taken out is all that there was."""
    return bool(_modules(config)) and not kept_in_graphs(config)


def _modules(config: Any) -> list[CudaGraphModule]:
    """Empty: whole layers, which arguments may also call "full"."""
    modules = config.cuda_graph_modules or []
    return [module for module in modules if isinstance(module, CudaGraphModule)]


def _recomputed(config: Any) -> list[str]:
    if config.recompute_granularity != "selective":
        return []
    return config.recompute_modules or []
