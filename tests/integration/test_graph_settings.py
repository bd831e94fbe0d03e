"""Which modules CUDA graphs may hold, what LLEP takes out of the list, and what it says of that."""

from types import SimpleNamespace

import pytest
from megatron.core.transformer.enums import CudaGraphModule, InferenceCudaGraphScope

from megatron_llep.integration.graphs import keep_planning_out_of_graphs, notices
from megatron_llep.validation import check_config
from support.layout import Layout
from support.llep import EAGER
from support.training import Run, make_config

TE, LOCAL = "transformer_engine", "local"
SUPPORTED = make_config(Run(layout=Layout(ep=2)))


def graphed(impl: str, *modules: str, recompute: tuple[str, ...] = ()) -> SimpleNamespace:
    changes = {
        "cuda_graph_impl": impl,
        "cuda_graph_modules": [CudaGraphModule[module] for module in modules],
        "recompute_granularity": "selective" if recompute else None,
        "recompute_modules": list(recompute),
    }
    return SimpleNamespace(**(vars(SUPPORTED) | changes))


@pytest.mark.parametrize(
    ("config", "kept", "told"),
    [
        (graphed(TE, "attn"), ["attn"], ""),
        (graphed(TE, "attn", "mlp", "mamba"), ["attn", "mlp", "mamba"], ""),
        (graphed(LOCAL, "attn", "mlp", "mamba"), ["attn", "mlp", "mamba"], ""),
        (graphed(TE, "moe_router"), ["moe_router"], ""),
        (
            graphed(TE, "attn", "moe_router", "moe_preprocess"),
            ["attn", "moe_router"],
            "moe_preprocess taken out",
        ),
        (
            graphed(TE, "attn", "moe_router", "moe_preprocess", recompute=("layernorm",)),
            ["attn"],
            "moe_router and moe_preprocess taken out",
        ),
        (graphed(TE, "attn", "moe_router", recompute=("layernorm",)), ["attn", "moe_router"], ""),
        (graphed("none"), [], ""),
        (graphed("none", "moe"), ["moe"], ""),
    ],
)
def test_what_is_captured(config, kept, told):
    check_config(config, EAGER)
    lines = notices(config)
    assert len(lines) == bool(told)
    assert all(told in line and "--cuda-graph-modules" in line for line in lines)
    modules = config.cuda_graph_modules
    keep_planning_out_of_graphs(config)
    assert [module.name for module in modules] == kept
    check_config(config, EAGER)
    assert notices(config) == []


@pytest.mark.parametrize(
    ("config", "refused"),
    [
        (graphed(TE), "of whole layers"),
        (graphed(LOCAL), "of whole layers"),
        (graphed(TE, "attn", "moe"), "moe"),
        (graphed(LOCAL, "attn", "moe_router", "moe_preprocess"), "moe_router moe_preprocess"),
        (graphed(TE, "moe", "moe_preprocess"), "moe"),
    ],
)
def test_what_would_hold_the_experts_is_named(config, refused):
    with pytest.raises(ValueError, match=f"--cuda-graph-modules {refused}: not supported"):
        check_config(config, EAGER)


@pytest.mark.parametrize(
    "config",
    [
        graphed(TE, "moe_preprocess"),
        graphed(TE, "moe_router", "moe_preprocess", recompute=("layernorm",)),
    ],
)
def test_nothing_is_captured_where_nothing_is_left(config):
    """An empty list would be that of whole layers, also to a copy that shares it."""
    copied = SimpleNamespace(**vars(config))
    check_config(config, EAGER)
    (line,) = notices(config)
    assert "moe_preprocess taken out" in line
    assert "--cuda-graph-impl none" in line
    for each in (config, copied):
        keep_planning_out_of_graphs(each)
        assert each.cuda_graph_impl == "none"
        assert each.cuda_graph_modules == []
        check_config(each, EAGER)
        assert notices(each) == []


def test_graphs_of_whole_blocks_in_inference():
    config = graphed(LOCAL, "attn")
    config.inference_cuda_graph_scope = InferenceCudaGraphScope.block
    with pytest.raises(ValueError, match="--inference-cuda-graph-scope block: not supported"):
        check_config(config, EAGER)
