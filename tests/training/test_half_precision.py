"""Training in 16 bits: loss scales in fp16, and gradients that add up or are reduced in 16 bits."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch

from megatron_llep.config import LLEPConfig
from support.layout import Layout
from support.llep import EAGER
from support.parity import Case, compare_all, compare_one
from support.ranks import run_ranks
from support.routing import Routing
from support.training import Run

# A large epsilon keeps the gradient's scale.
ADAM = {"optimizer": "adam", "adam_eps": 1.0}
# What --fp16 does by default, and --bf16 with --grad-reduce-in-bf16.
IN_16_BITS = {"grad_reduce_in_fp32": False}
OVERLAP = {"overlap_grad_reduce": True, "bucket_size": 5000}
DISTRIBUTED = OVERLAP | {"use_distributed_optimizer": True}
GROUPED = replace(EAGER, expert_gemm="grouped_mm")


def make_run(
    dtype: torch.dtype,
    *,
    ddp: dict[str, Any],
    optimizer: dict[str, Any] | None = None,
    steps: int = 2,
    layout: Layout | None = None,
) -> Run:
    in_16_bits = {"bf16" if dtype == torch.bfloat16 else "fp16": True, "params_dtype": dtype}
    return Run(
        layout=layout or Layout(ep=2),
        # Near ties of the router's own choice go either way in 16 bits.
        routing=Routing("hot"),
        steps=steps,
        micro_batches=4,
        config=in_16_bits | {"pipeline_dtype": dtype},
        ddp=ddp,
        optimizer=in_16_bits | {"lr": 0.01} | (optimizer or {}),
    )


def fp16(llep: LLEPConfig = EAGER, *, ddp: dict[str, Any], **settings: Any) -> Case:
    optimizer = {"initial_loss_scale": 2.0**12} | settings.pop("optimizer", {})
    run = make_run(torch.float16, ddp=ddp, optimizer=optimizer, steps=3, **settings)
    return Case(run, llep, loss_tolerance=1e-4, gradient_tolerance=1e-2)


def bf16(llep: LLEPConfig = EAGER, **settings: Any) -> Case:
    run = make_run(torch.bfloat16, **settings)
    return Case(run, llep, loss_tolerance=1e-3, gradient_tolerance=2e-2)


def test_fp16():
    compare_all(
        {
            "gradients in fp16": fp16(ddp=IN_16_BITS),
            "gradients in fp32, a fixed scale": fp16(ddp={}, optimizer={"loss_scale": 1024.0}),
            "returned in fp16": fp16(replace(EAGER, grad_dtype="param"), ddp={}),
            "fetched again": fp16(replace(GROUPED, foreign_weights="refetch"), ddp=IN_16_BITS),
            "distributed optimizer": fp16(ddp=IN_16_BITS | DISTRIBUTED, optimizer=ADAM),
        }
    )


def test_a_loss_scale_that_moves():
    """Steps are skipped, and the scale goes down and up, where plain Megatron does so."""
    scale = {"initial_loss_scale": 2.0**20, "hysteresis": 1, "loss_scale_window": 2}
    run = make_run(torch.float16, ddp=IN_16_BITS, optimizer=scale, steps=6)

    def work(rank, size):
        plain, _ = compare_one(Case(run, loss_tolerance=1e-3, gradient_tolerance=1e-2))
        return plain.gradient_norms

    for norms in run_ranks(work, 2):
        is_skipped = [norm < 0 for norm in norms]
        # The first one because of the scale, a later one because the scale has grown again.
        assert is_skipped[0]
        assert not is_skipped[-1]
        assert any(later > earlier for earlier, later in pairwise(is_skipped))


def test_gradients_in_bf16():
    in_fp32 = {"param_name_patterns_for_fp32_local_accumulation": ("*experts*",)}
    compare_all(
        {
            "reduced": bf16(ddp=IN_16_BITS),
            "returned in bf16": bf16(replace(EAGER, grad_dtype="param"), ddp=IN_16_BITS),
            "grouped_mm": bf16(GROUPED, ddp=IN_16_BITS | OVERLAP),
            "added up in fp32": bf16(ddp=IN_16_BITS | OVERLAP | in_fp32),
        }
    )


def test_gradients_in_bf16_of_two_replicas():
    layout = Layout(ep=2, dp=4)
    in_fp32 = {"reduce_scatter_with_fp32_accumulation": True}
    compare_all(
        {
            "distributed optimizer": bf16(
                layout=layout, ddp=IN_16_BITS | DISTRIBUTED, optimizer=ADAM
            ),
            "summed in fp32": bf16(
                layout=layout, ddp=IN_16_BITS | DISTRIBUTED | in_fp32, optimizer=ADAM
            ),
        }
    )
