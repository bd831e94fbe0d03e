"""Transformer Engine's experts in a model that was built for what LLEP replaces.

TE's kernels are stand-ins here, and its fused operations are never made: they need a GPU.
"""

import pytest

pytest.importorskip("transformer_engine.pytorch")

from megatron.core import fp8_utils
from megatron.core.transformer.moe.experts import TEGroupedMLP
from megatron.core.transformer.moe.moe_utils import skip_routed_expert_padding
from te_cpu_stand_in import make_fp8_recipe
from te_experts import TE_CONFIG, use_te_experts

from megatron_llep.integration.convert import convert_model
from megatron_llep.layer import LLEPMoELayer
from support.layout import Layout, use_layout
from support.llep import EAGER, assert_same_run
from support.ranks import run_ranks
from support.routing import Routing
from support.training import Chunks, Run, train

pytestmark = pytest.mark.te


def convert_as_built_with_flags(chunks: Chunks) -> None:
    """With --use-transformer-engine-op-fuser and --moe-router-padding-for-quantization."""
    config = chunks[0].config
    config.moe_router_padding_for_quantization = True
    experts = [module for module in chunks[0].modules() if isinstance(module, TEGroupedMLP)]
    for each in experts:
        each._with_fused_impl = True
        each.quantization_padding.align_size = each.quantization_unpadding.align_size = 256
    convert_model(chunks, EAGER)
    assert any(isinstance(module, LLEPMoELayer) for module in chunks[0].modules())
    assert not skip_routed_expert_padding(config)


def test_fp8_trains_as_without_the_flags(monkeypatch):
    monkeypatch.setattr(fp8_utils, "get_fp8_recipe", lambda config: make_fp8_recipe(64.0))
    run = Run(
        layout=Layout(ep=2),
        routing=Routing("hot"),
        spec=use_te_experts,
        config=TE_CONFIG | {"fp8": "hybrid", "fp8_recipe": "tensorwise"},
    )

    def work(rank, size):
        with use_layout(run.layout):
            assert_same_run(train(run, transform_model=convert_as_built_with_flags), train(run))

    run_ranks(work, 2)
