"""The function for Megatron's --spec."""

from argparse import ArgumentParser, Namespace
from types import SimpleNamespace

import pytest

from megatron_llep.config import LLEPConfig
from megatron_llep.integration.arguments import add_llep_arguments
from megatron_llep.layer import LLEPMoELayer
from support.layout import Layout, use_layout
from support.ranks import run_ranks
from support.training import Run, build_model, make_config

FLAGS = vars(add_llep_arguments(ArgumentParser()).parse_args(["--moe-llep"]))
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
            FLAGS | {"moe_llep_planner": "lla", "moe_llep_min_tokens_per_gemm": 5},
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
