"""A hybrid model of Megatron, whose layers follow a pattern: attention and experts apart.

Mamba layers need kernels that are for GPUs only; the pattern here has none.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from megatron.core import parallel_state
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.models.hybrid.hybrid_layer_allocation import get_hybrid_layer_counts
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    MoETransformerLayer,
    TransformerLayer,
    TransformerLayerSubmodules,
)

from megatron_llep.integration.convert import convert_model
from megatron_llep.integration.local_spec import build_local_block_spec
from megatron_llep.metrics import METRICS, PREFIX
from support import training
from support.layout import Layout
from support.llep import EAGER, assert_same_run
from support.metrics import Scalars, report
from support.ranks import run_ranks
from support.routing import Routing
from support.training import VOCABULARY, Chunks, Run, train
from support.weights import fill_parameters, list_parameters

PATTERN = "*E*|**E"
RUN = Run(
    layout=Layout(pp=2, ep=2), routing=Routing("hot"), config={"num_layers": len(PATTERN) - 1}
)


def build_hybrid(
    config: TransformerConfig, run: Run, transform_spec: Callable[[Any], Any] | None = None
) -> Chunks:
    """This rank's stage: Megatron's stack of local modules, without its last norm (TE's)."""
    one_layer = replace(config, num_layers=1, pipeline_model_parallel_size=1)
    local = build_local_block_spec(one_layer, pp_rank=0).layer_specs[0].submodules
    attention = TransformerLayerSubmodules(
        input_layernorm=local.input_layernorm,
        self_attention=local.self_attention,
        self_attn_bda=local.self_attn_bda,
    )
    experts = TransformerLayerSubmodules(
        pre_mlp_layernorm=local.pre_mlp_layernorm, mlp=local.mlp, mlp_bda=local.mlp_bda
    )
    stack = ModuleSpec(
        module=HybridStack,
        params={"post_layer_norm": False},
        submodules=HybridStackSubmodules(
            attention_layer=ModuleSpec(module=TransformerLayer, submodules=attention),
            moe_layer=ModuleSpec(module=MoETransformerLayer, submodules=experts),
        ),
    )
    model = HybridModel(
        config,
        stack,
        vocab_size=VOCABULARY,
        max_sequence_length=run.sequence_length,
        hybrid_layer_pattern=PATTERN,
        position_embedding_type="rope",
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
    )
    fill_parameters(list_parameters([model], run.layout))
    return [model]


def report_hybrid() -> tuple[str, Scalars]:
    """As Megatron's training log does for a hybrid model: it tells the number of MoE layers."""
    return report(
        force_initialize=True,
        num_layers=get_hybrid_layer_counts(PATTERN)["E"],
        moe_layer_freq=1,
        mtp_num_layers=None,
        pg_collection=None,
        total_loss_dict={},
    )


def test_trains_and_logs():
    def work(rank, size):
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr(training, "build_model", build_hybrid)
            plain = train(RUN)
            lending = train(
                RUN,
                transform_model=lambda chunks: convert_model(chunks, EAGER),
                observe=lambda _: report_hybrid(),
            )
        assert_same_run(lending, plain)
        line, scalars = lending.observed
        assert scalars[f"{PREFIX}lent_experts"] > 0
        for metric in METRICS:
            assert f" {metric.name}: " in line
            layers = [name for name in scalars if name.startswith(f"{PREFIX}{metric.name}_layer_")]
            assert sorted(layers) == [f"{PREFIX}{metric.name}_layer_{layer}" for layer in (1, 5)]
        return line

    lines = run_ranks(work, 4)
    assert len(set(lines)) == 1
