"""Megatron's layers for machines without Transformer Engine, with our norm."""

from types import SimpleNamespace

import pytest
import torch

from megatron_llep.integration.local_norm import build_norm
from support.comparison import assert_same_training
from support.layout import Layout, use_layout
from support.ranks import run_ranks
from support.training import Run, build_model, make_config, train


def config_with(**changes):
    settings = {
        "normalization": "RMSNorm",
        "layernorm_zero_centered_gamma": False,
        "sequence_parallel": False,
        "persist_layer_norm": True,
    }
    return SimpleNamespace(**(settings | changes))


@pytest.mark.parametrize("normalization", ["RMSNorm", "LayerNorm"])
@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_norm_is_torchs_and_marked_for_sequence_parallelism(normalization, sequence_parallel):
    config = config_with(normalization=normalization, sequence_parallel=sequence_parallel)
    norm = build_norm(config, 8, eps=1e-3)
    assert type(norm) is getattr(torch.nn, normalization)
    assert norm.eps == 1e-3
    assert [p.sequence_parallel for p in norm.parameters()] == [
        sequence_parallel for _ in norm.parameters()
    ]


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"normalization": "L2Norm"}, "--normalization L2Norm"),
        ({"layernorm_zero_centered_gamma": True}, "--apply-layernorm-1p"),
    ],
)
def test_norm_refuses_what_needs_transformer_engine(changes, flag):
    with pytest.raises(ValueError, match=flag):
        build_norm(config_with(**changes), 8)


FEATURES = {
    "dense first layer": {"moe_layer_freq": [0, 1]},
    "norm of queries and keys": {"qk_layernorm": True},
    "shared expert": {"moe_shared_expert_intermediate_size": 32},
    "multi-token prediction": {"mtp_num_layers": 1},
    "layer norm": {"normalization": "LayerNorm"},
}


@pytest.mark.parametrize("feature", FEATURES)
def test_feature_trains_under_tensor_and_sequence_parallelism(feature):
    config, layout = FEATURES[feature], Layout(tp=2, ep=2, etp=1)
    single = run_ranks(lambda rank, size: train(Run(config=config)), 1)[0]
    run = Run(layout=layout, config=config)
    assert_same_training(run_ranks(lambda rank, size: train(run), 2), single)


def test_features_build_the_modules_they_name():
    """So that the test above does not compare two models that both lack the feature."""

    def list_names(rank, world_size):
        names = {}
        for feature, changes in FEATURES.items():
            run = Run(config=changes)
            with use_layout(run.layout):
                (chunk,) = build_model(make_config(run), run)
            names[feature] = list(dict(chunk.named_parameters()))
        return names

    names = run_ranks(list_names, 1)[0]
    assert "decoder.layers.0.mlp.linear_fc1.weight" in names["dense first layer"]
    assert "decoder.layers.1.mlp.router.weight" in names["dense first layer"]
    attention = "decoder.layers.0.self_attention."
    assert attention + "q_layernorm.weight" in names["norm of queries and keys"]
    assert any("shared_experts" in name for name in names["shared expert"])
    assert any(name.startswith("mtp.") for name in names["multi-token prediction"])
    assert "decoder.final_layernorm.bias" in names["layer norm"]
