"""Megatron's settings one by one: those that reach gradients, their hooks or the order of forwards.

What changes the routing alone, or the activations, is among the slow ones.
"""

from dataclasses import replace
from typing import Any

import pytest
from megatron.core.activations import squared_relu

from megatron_llep.config import LLEPConfig
from support.layout import Layout
from support.llep import EAGER
from support.parity import Case, compare_all
from support.routing import Routing
from support.training import Run

GROUPED = replace(EAGER, expert_gemm="grouped_mm")
REFETCH = replace(GROUPED, foreign_weights="refetch")
# The distributed optimizer takes Adam alone; a large epsilon keeps the gradient's scale.
ADAM = {"optimizer": "adam", "adam_eps": 1.0, "lr": 0.5}
OVERLAP = {"overlap_grad_reduce": True, "bucket_size": 5000}
DISTRIBUTED = OVERLAP | {"use_distributed_optimizer": True}
GATHER = DISTRIBUTED | {"overlap_param_gather": True}
SHARED = {"moe_shared_expert_intermediate_size": 32}
ONE_DENSE = {"moe_layer_freq": [0, 1]}


def recompute(*modules: str) -> dict[str, Any]:
    return {"recompute_granularity": "selective", "recompute_modules": list(modules)}


def case(
    llep: LLEPConfig = EAGER, *, layout: Layout | None = None, routing: str = "hot", **settings: Any
) -> Case:
    layout = layout or Layout(ep=2)
    config = {"num_layers": max(2, layout.pp * (layout.vpp or 1))} | settings.pop("config", {})
    return Case(
        Run(
            layout=layout,
            routing=Routing(routing, ranks=layout.ep),
            micro_batches=2 * layout.data_parallel * layout.pp,
            config=config,
            **({"steps": 2, "optimizer": ADAM} | settings),
        ),
        llep,
    )


def natural(**config: Any) -> Case:
    """Where the setting has a say in the routing."""
    return case(routing="natural", config=config)


def capacity(factor: float, policy: str) -> dict[str, Any]:
    """Every expert takes so many times its even share of a rank's tokens, and drops the rest."""
    return {"moe_expert_capacity_factor": factor, "moe_token_drop_policy": policy}


FAST = {
    # Tokens with less than top-k experts, or with none: the hot expert drops half of its tokens.
    "drop by probability": case(config=capacity(2.0, "probs") | SHARED),
    "drop by position": case(GROUPED, config=capacity(2.0, "position"), ddp=OVERLAP),
    # Recompute of modules around the experts, alone and with them.
    "recompute shared_experts": case(config=SHARED | recompute("shared_experts")),
    "recompute shared_experts, moe": case(config=SHARED | recompute("shared_experts", "moe")),
    "recompute mlp": case(config=ONE_DENSE | recompute("mlp")),
    "recompute mlp, moe": case(GROUPED, config=ONE_DENSE | recompute("mlp", "moe")),
    # Several forwards of a layer before its backward.
    "mlp_chunks_for_training": case(REFETCH, config=SHARED | {"mlp_chunks_for_training": 3}),
    "mlp_chunks_for_training, recomputed": case(
        config=recompute("moe") | {"mlp_chunks_for_training": 2}, ddp=OVERLAP, steps=3
    ),
    "mtp_use_repeated_layer": case(
        config={"mtp_num_layers": 2, "mtp_use_repeated_layer": True}, ddp=OVERLAP, steps=3
    ),
    # What DDP does to a bucket when it is complete.
    "average_in_collective": case(ddp=OVERLAP | {"average_in_collective": True}),
    "num_buckets": case(ddp={"overlap_grad_reduce": True, "num_buckets": 3}, steps=3),
    "check_for_nan_in_grad": case(ddp=OVERLAP | {"check_for_nan_in_grad": True}),
    "check_for_large_grads": case(ddp={"check_for_large_grads": True}),
    "pad_buckets_for_high_nccl_busbw": case(
        ddp=GATHER | {"pad_buckets_for_high_nccl_busbw": True}, steps=3
    ),
}


def test_settings():
    compare_all(FAST, timeout=120)


WITH_REPLICAS = Layout(ep=2, dp=4)
INSTANCES = Layout(ep=2, dp=4, instances=2)
EVERYWHERE = replace(EAGER, replicas="expert-dp")


def test_settings_with_replicas():
    """Expert data parallelism of 2: what is reduced too early shows from the second step on."""
    chunks = recompute("moe") | {"mlp_chunks_for_training": 2}
    compare_all(
        {
            "num_distributed_optimizer_instances": case(layout=INSTANCES, ddp=GATHER, steps=3),
            "instances, replicas": case(EVERYWHERE, layout=INSTANCES, ddp=DISTRIBUTED, steps=3),
            "mlp_chunks_for_training": case(
                layout=WITH_REPLICAS, routing="natural", config=chunks, ddp=GATHER, steps=3
            ),
        },
        timeout=120,
    )


def test_dropped_tokens_in_parts_of_a_sequence():
    layout = Layout(tp=2, ep=4, etp=1)
    compare_all(
        {
            "by probability": case(layout=layout, config=capacity(1.0, "probs")),
            "by position": case(
                layout=layout, routing="natural", config=capacity(0.5, "position"), ddp=DISTRIBUTED
            ),
        },
        timeout=120,
    )


def test_settings_of_a_pipeline():
    """Reductions and gathers at the moments at which Megatron's training starts them."""
    layout = Layout(pp=2, vpp=2, ep=2)
    aligned = GATHER | {"align_param_gather": True}
    groups = {"microbatch_group_size_per_vp_stage": 4}
    compare_all(
        {
            "align_grad_reduce": case(layout=layout, ddp=aligned, steps=3, align_grad_reduce=True),
            "microbatch_group_size_per_vp_stage": case(layout=layout, config=groups, ddp=OVERLAP),
        },
        timeout=120,
    )


SLOW = {
    "z loss": natural(moe_z_loss_coeff=1e-2),
    "input jitter": case(config={"moe_input_jitter_eps": 0.1}),
    "force load balancing": natural(moe_router_force_load_balancing=True),
    "force biased": natural(moe_router_force_biased=1.0),
    "router in fp64": natural(moe_router_dtype="fp64"),
    "before softmax, scaled": natural(
        moe_router_pre_softmax=True, moe_router_topk_scaling_factor=2.5
    ),
    "sqrtsoftplus": natural(moe_router_score_function="sqrtsoftplus"),
    "sinkhorn": natural(moe_router_load_balancing_type="sinkhorn", moe_router_topk=1),
    "quantile balancing": natural(moe_router_load_balancing_type="quantile_balancing"),
    "auxiliary losses per layer": natural(
        moe_router_load_balancing_type=["aux_loss", "seq_aux_loss", "global_aux_loss"],
        moe_aux_loss_coeff=[1e-2, 1e-2, 1e-2],
        moe_per_layer_logging=True,
        calculate_per_token_loss=True,
    ),
    "gate of shared experts": case(config=SHARED | {"moe_shared_expert_gate": True}),
    "dropout": case(config={"hidden_dropout": 0.1, "attention_dropout": 0.1}),
    "fused SwiGLU": case(config={"bias_activation_fusion": True}),
    "fused SwiGLU, grouped": case(GROUPED, config={"bias_activation_fusion": True}),
    "squared ReLU": case(
        GROUPED,
        config={
            "gated_linear_unit": False,
            "activation_func": squared_relu,
            "use_fused_weighted_squared_relu": True,
        },
    ),
    "offset of the gate": case(GROUPED, config={"glu_linear_offset": 1.0}),
    "fused cross entropy": case(config={"cross_entropy_loss_fusion": True}),
    "deterministic": case(config={"deterministic_mode": True}),
    "initialisation on the host": case(config={"use_cpu_initialization": True}),
    "mup": case(config={"use_mup": True, "mup_base_hidden_size": 16}),
    "detached MTP heads": case(config={"mtp_num_layers": 1, "mtp_detach_heads": True}),
    "one learning rate for embeddings": case(optimizer=ADAM | {"decoupled_lr": 0.1}),
    "zeros in gradients": case(optimizer=ADAM | {"log_num_zeros_in_grad": True}),
    "skipped steps": case(optimizer=ADAM | {"grad_norm_skip_threshold": 0.5}),
}


@pytest.mark.slow
def test_more_settings():
    compare_all(SLOW, timeout=240)


@pytest.mark.slow
def test_ranks_in_another_order():
    layout = Layout(tp=2, pp=2, ep=2, etp=1, dp=2, pp_before_dp=True)
    compare_all(
        {
            "natural": case(layout=layout, routing="natural", ddp=DISTRIBUTED, steps=3),
            "replicas": case(EVERYWHERE, layout=layout, ddp=DISTRIBUTED, steps=3),
        },
        timeout=240,
    )
