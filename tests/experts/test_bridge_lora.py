"""The LoRA of Megatron-Bridge itself, put in by its own call, where Bridge is installed."""

import importlib.util
from dataclasses import replace
from functools import partial

import pytest

from megatron_llep.training.hf.bridge import import_bridge
from megatron_llep.training.hf.te_stub import transformer_engine_named
from support.layout import Layout
from support.llep import EAGER
from support.lora import fill_adapters
from support.parity import Case, compare_all
from support.training import Chunks, Run, build_model

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("megatron.bridge") is None, reason="needs megatron-bridge"
)


def add(chunks: Chunks, *, canonical: bool = False) -> None:
    with transformer_engine_named():
        from megatron.bridge.peft import utils
        from megatron.bridge.peft.canonical_lora import CanonicalLoRA
        from megatron.bridge.peft.lora import LoRA

    utils.HAVE_TE = False  # Megatron has the names of its classes, without the classes
    fc1 = ["linear_fc1_up", "linear_fc1_gate"] if canonical else ["linear_fc1"]
    lora = (CanonicalLoRA if canonical else LoRA)(
        target_modules=[f"*.mlp.experts.*.{name}" for name in [*fc1, "linear_fc2"]], dim=4, alpha=8
    )
    assert lora(chunks, training=True) is chunks
    for name, parameter in chunks[0].named_parameters():
        assert parameter.requires_grad == (".adapter." in name)
    fill_adapters(chunks)  # one half is zero


def test_in_both_orders():
    import_bridge()

    def build(config, run, transform_spec):
        chunks = build_model(config, run, transform_spec)
        add(chunks)
        return chunks

    layout = Layout(ep=2)
    grouped = replace(EAGER, expert_gemm="grouped_mm")
    compare_all(
        {
            "after": Case(Run(layout=layout, prepare=add)),
            "before": Case(Run(layout=layout, build=build)),
            "canonical": Case(Run(layout=layout, prepare=partial(add, canonical=True)), grouped),
        }
    )
