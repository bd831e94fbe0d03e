"""Muon, whole and distributed by layers, and Lion: they step as with plain Megatron's gradients.

Runs where the package is installed: pip install emerging-optimizers==0.3.0
"""

from dataclasses import replace
from typing import Any

import pytest
import torch

from support.layout import Layout
from support.parity import Case, compare_all
from support.routing import Routing
from support.training import Run

pytest.importorskip("emerging_optimizers")

# In less precision its iteration magnifies what rounding leaves of a singular value of zero.
MUON = {"optimizer": "muon", "muon_fp32_matmul_prec": "highest", "lr": 0.02}
BF16 = {"bf16": True, "params_dtype": torch.bfloat16}
BY_LAYER = MUON | BF16 | {"use_layer_wise_distributed_optimizer": True}
OVERLAP = {"overlap_grad_reduce": True, "bucket_size": 5000}


def make_run(layout: Layout, **settings: Any) -> Run:
    return Run(layout=layout, routing=Routing("hot"), micro_batches=8, **settings)


def by_layer(layout: Layout, ddp: dict[str, Any]) -> Case:
    gathers = {"overlap_param_gather": ddp.get("overlap_param_gather", False)}
    run = make_run(
        layout,
        config=BF16 | {"pipeline_dtype": torch.bfloat16},
        optimizer=BY_LAYER | gathers,
        ddp=ddp,
    )
    return Case(
        run,
        loss_tolerance=5e-3,
        gradient_tolerance=2e-2,
        # In fp32 Megatron cannot distribute it by layers.
        exact=replace(run, config={}, optimizer=MUON, ddp={}),
    )


@pytest.mark.parametrize("layout", [Layout(ep=2), Layout(ep=2, dp=4)], ids=str)
def test_emerging_optimizers(layout):
    compare_all(
        {
            "lion": Case(make_run(layout, optimizer={"optimizer": "lion", "lr": 0.02}, steps=3)),
            "muon": Case(make_run(layout, optimizer=MUON, ddp=OVERLAP, steps=3)),
            "muon by layer": by_layer(layout, {}),
            "muon by layer, overlapped": by_layer(layout, OVERLAP | {"overlap_param_gather": True}),
        },
        timeout=120,
    )
