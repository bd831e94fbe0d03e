"""A model that brings its process groups along, where Megatron has no global ones."""

import pytest
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_llep.integration.convert import llep_hook
from megatron_llep.layer import LLEPMoELayer
from support.layout import Layout, use_layout
from support.llep import EAGER
from support.ranks import run_ranks
from support.training import Run, build_model, make_config

RUN = Run(layout=Layout(ep=2))


def test_a_hook_takes_the_models_own():
    def work(rank, size):
        with use_layout(RUN.layout):
            groups = ProcessGroupCollection.use_mpu_process_groups()
            models = [build_model(make_config(RUN), RUN) for _ in range(2)]
        for chunks in models:  # Megatron gives its modules the global groups where none are given
            for module in chunks[0].modules():
                vars(module).pop("pg_collection", None)
        with pytest.raises(ValueError, match=r"not initialised.*pg_collection"):
            llep_hook(EAGER)(models[0])
        models[1][0].pg_collection = groups
        (model,) = llep_hook(EAGER)(models[1])
        layers = [module for module in model.modules() if isinstance(module, LLEPMoELayer)]
        assert len(layers) == 2
        for layer in layers:
            assert layer.token_dispatcher.ep_group is groups.ep
            assert layer.lending_group is not groups.ep
            assert dist.get_process_group_ranks(layer.lending_group) == [0, 1]

    run_ranks(work, 2)
