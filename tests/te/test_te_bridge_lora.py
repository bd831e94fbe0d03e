"""Megatron-Bridge's own LoRA around Transformer Engine's experts, where Bridge is installed too."""

from dataclasses import replace
from functools import partial

import pytest

pytest.importorskip("transformer_engine.pytorch")
pytest.importorskip("megatron.bridge")

from te_experts import TE_CONFIG, use_te_experts

from support.layout import Layout
from support.llep import EAGER
from support.lora import fill_adapters
from support.parity import Case, compare_all
from support.training import Chunks, Run, build_model

pytestmark = pytest.mark.te


def add(chunks: Chunks, *, shared: bool) -> None:
    from megatron.bridge.peft.lora import LoRA

    lora = LoRA(
        target_modules=["*.mlp.experts.linear_fc1", "*.mlp.experts.linear_fc2"],
        dim=4,
        alpha=8,
        share_expert_adapters=shared,
    )
    assert lora(chunks, training=True) is chunks
    trained = [name for name, each in chunks[0].named_parameters() if each.requires_grad]
    assert trained
    assert all(".experts." in name and ".adapter." in name for name in trained)
    fill_adapters(chunks, same=shared)  # one half is zero


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "of each expert"])
def test_in_both_orders(shared):
    def build(config, run, transform_spec):
        chunks = build_model(config, run, transform_spec)
        add(chunks, shared=shared)
        return chunks

    run = Run(layout=Layout(ep=2), config=TE_CONFIG, spec=use_te_experts, steps=3)
    after = replace(run, prepare=partial(add, shared=shared))
    compare_all(
        {
            "after": Case(after),
            "before": Case(replace(run, build=build), replace(EAGER, foreign_weights="refetch")),
        }
    )
