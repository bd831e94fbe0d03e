"""The function for Megatron's --spec."""

from argparse import Namespace
from types import SimpleNamespace

import pytest

from megatron_llep.config import LLEPConfig
from megatron_llep.layer import LLEPMoELayer
from support.layout import Layout, use_layout
from support.ranks import run_ranks
from support.training import Run, build_model, make_config

CALLS = {
    "Megatron's": lambda build, args, config: build(SimpleNamespace(transformer=config)),
    "with the stage": lambda build, args, config: build(config, vp_stage=None),
    "slime's": lambda build, args, config: build(args, config, None),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, LLEPConfig()),
        (
            {
                "moe_llep": True,
                "moe_llep_planner": "lla",
                "moe_llep_tolerance": 0.05,
                "moe_llep_cost_model": None,
                "moe_llep_replicas": "none",
                "moe_llep_ranks_per_node": None,
                "moe_llep_lend_to": "any_node",
                "moe_llep_capacity_factor": 1.0,
                "moe_llep_min_tokens_per_gemm": 5,
                "moe_llep_imbalance_threshold": None,
                "moe_llep_max_foreign_experts": None,
                "moe_llep_token_assignment": "local_first",
                "moe_llep_foreign_weights": None,
                "moe_llep_grad_dtype": "fp32",
                "moe_llep_expert_gemm": "megatron",
                "moe_llep_scatter_from": 3,
            },
            LLEPConfig(planner="lla", min_tokens_per_gemm=5),
        ),
    ],
    ids=["a script without our flags", "a script with them"],
)
def test_layers_are_built_with_the_scripts_settings(flags, expected, call):
    def work(rank, size):
        from megatron.training import global_vars

        from megatron_llep.integration.spec import gpt_layers_with_llep

        args = Namespace(**flags)
        if call != "slime's":
            global_vars.set_args(args)
        run = Run(layout=Layout(ep=2), config={"moe_layer_freq": [0, 1]})
        with use_layout(run.layout):
            config = make_config(run)
            layers = CALLS[call](gpt_layers_with_llep, args, config)
            (chunk,) = build_model(config, run, lambda spec: layers)
            dense, moe = (layer.mlp for layer in chunk.decoder.layers)
            assert not isinstance(dense, LLEPMoELayer)
            assert isinstance(moe, LLEPMoELayer)
            assert moe.llep == expected

    run_ranks(work, 2)
