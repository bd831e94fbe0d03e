"""`--overlap-moe-expert-parallel-comm`: a forward runs beside another micro-batch's backward.

Megatron cuts the graph between a layer's steps there, and runs each piece's backward by itself.
Both runs use that schedule, plain and with LLEP.
"""

from dataclasses import replace
from typing import Any

import torch

from megatron_llep.config import LLEPConfig
from support.layout import Layout
from support.llep import EAGER
from support.parity import Case, compare_all
from support.routing import Routing
from support.training import Run

BF16 = {"bf16": True, "params_dtype": torch.bfloat16}
# Megatron wants the flag; the numbers are fp32's, which tells more than rounding lets through.
IN_FP32 = {"bf16": True, "attention_softmax_in_fp32": False}
# A large epsilon keeps the gradient's scale.
ADAM = {"optimizer": "adam", "adam_eps": 1.0, "lr": 0.5}
OVERLAP = {"overlap_grad_reduce": True, "bucket_size": 5000}
GATHER = OVERLAP | {"use_distributed_optimizer": True, "overlap_param_gather": True}
SHARED = {"moe_shared_expert_intermediate_size": 32}
MTP = {"mtp_num_layers": 1}
# Of Megatron's own linears, whose gradients come in backward all the same.
DELAYED = {"delay_wgrad_compute": True}
KEEP, REFETCH = (replace(EAGER, foreign_weights=choice) for choice in ("keep", "refetch"))
GROUPED = replace(EAGER, expert_gemm="grouped_mm")
SCATTERED = replace(EAGER, scatter_from=2)


def overlapped(
    llep: LLEPConfig = EAGER, *, layout: Layout | None = None, routing: str = "hot", **settings: Any
) -> Case:
    layout = layout or Layout(ep=2)
    config = {
        "overlap_moe_expert_parallel_comm": True,
        "num_layers": max(2, layout.pp * (layout.vpp or 1)),
    }
    run = Run(
        layout=layout,
        routing=Routing(routing, ranks=layout.ep),
        micro_batches=4 * layout.data_parallel * layout.pp,
        config=IN_FP32 | config | settings.pop("config", {}),
        **settings,
    )
    return Case(run, llep)


def in_bf16(case: Case) -> Case:
    config = {**case.run.config, **BF16, "pipeline_dtype": torch.bfloat16}
    optimizer = {**BF16, "lr": 0.01, **case.run.optimizer}
    return replace(
        case,
        run=replace(case.run, config=config, optimizer=optimizer),
        loss_tolerance=1e-3,
        gradient_tolerance=2e-2,
    )


def test_two_ranks():
    compare_all(
        {
            "kept": overlapped(KEEP),
            "refetched": overlapped(REFETCH, config=SHARED),
            "a dense layer": overlapped(config={"moe_layer_freq": [0, 1]}, ddp=OVERLAP),
            "MTP": overlapped(config=SHARED | MTP, ddp=OVERLAP, steps=3),
            "grouped_mm": overlapped(GROUPED, config=SHARED, ddp=OVERLAP),
            "delayed": overlapped(config=SHARED | DELAYED, ddp=OVERLAP),
            "bf16": in_bf16(overlapped(config=SHARED)),
            "early release": overlapped(config={"ep_overlap_early_attn_memory_release": True}),
        },
        timeout=120,
    )


def test_replicas_and_shards():
    """Expert data parallelism of 2: what is reduced too early shows from the second step on."""
    replicas = Layout(ep=2, dp=4)
    compare_all(
        {
            "overlapped reduction": overlapped(layout=replicas, ddp=OVERLAP, steps=3),
            "distributed optimizer": overlapped(
                REFETCH, layout=replicas, config=SHARED, ddp=GATHER, optimizer=ADAM, steps=3
            ),
            "shards": overlapped(SCATTERED, layout=Layout(ep=4), ddp=OVERLAP, steps=3),
        },
        timeout=120,
    )


def test_pipeline():
    layout = Layout(pp=2, vpp=2, ep=2)
    compare_all(
        {
            "kept": in_bf16(overlapped(KEEP, layout=layout, config=SHARED, ddp=OVERLAP)),
            "refetched": overlapped(layout=layout, ddp=GATHER, optimizer=ADAM, steps=3),
            "aligned": overlapped(
                layout=layout, ddp=OVERLAP, steps=3, align_grad_reduce=True, config=SHARED
            ),
            "MTP": overlapped(layout=layout, config=MTP, ddp=OVERLAP),
        },
        timeout=120,
    )
