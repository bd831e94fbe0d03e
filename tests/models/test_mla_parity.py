"""Models with multi-latent attention: LLEP trains them as plain expert parallelism does."""

import pytest

from support.latent_attention import LATENT
from support.layout import Layout
from support.llep import EAGER
from support.parity import Case, compare_all
from support.routing import Routing
from support.training import Run
from support.versions import needs_megatron

pytestmark = needs_megatron((0, 19), "latent attention without Transformer Engine")

ROPE = {"rope_type": "rope"}
YARN = {"rope_type": "yarn", "mscale_all_dim": 1.0}
NO_QUERY_RANK = {"q_lora_rank": None}
DEEPSEEK = YARN | {
    "num_layers": 4,
    "moe_layer_freq": [0, 1, 1, 1],
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_router_bias_update_rate": 0.05,
    "moe_router_topk_scaling_factor": 2.5,
    "moe_router_dtype": "fp32",
    "moe_router_num_groups": 4,
    "moe_router_group_topk": 2,
    "moe_shared_expert_intermediate_size": 32,
    "mtp_num_layers": 1,
}
RECOMPUTED = {
    "recompute_granularity": "selective",
    "recompute_modules": ["core_attn", "mla_up_proj", "moe"],
}
EP2, TP2_EP2, PP2_EP2 = Layout(ep=2), Layout(tp=2, ep=2, etp=1), Layout(pp=2, ep=2)


def make_case(layout, **changes):
    micro_batches = max(2, layout.pp) * layout.data_parallel
    run = Run(
        layout=layout,
        routing=Routing("hot", ranks=layout.ep),
        steps=2,
        micro_batches=micro_batches,
        config=LATENT | ROPE | changes,
        optimizer={"lr": 0.01},
    )
    return Case(run, EAGER)


def test_two_ranks():
    compare_all(
        {
            "rope": make_case(EP2),
            "no query rank, yarn, odd heads": make_case(
                EP2, **NO_QUERY_RANK, **YARN, num_attention_heads=3, v_head_dim=5
            ),
            "DeepSeek, recomputed": make_case(EP2, **DEEPSEEK, **RECOMPUTED),
            "TP 2, yarn": make_case(TP2_EP2, **YARN),
            "TP 2, no query rank, rope, layer norm": make_case(
                TP2_EP2, **NO_QUERY_RANK, normalization="LayerNorm"
            ),
            "TP 2, DeepSeek": make_case(TP2_EP2, **DEEPSEEK),
        }
    )


def test_pipeline_stages():
    compare_all(
        {
            "DeepSeek": make_case(PP2_EP2, **DEEPSEEK),
            # The last stage has no layer that multi-token prediction could repeat.
            "prediction alone": make_case(
                PP2_EP2, **DEEPSEEK, pipeline_model_parallel_layout="Etttt|mL"
            ),
        }
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [
        Layout(tp=2, pp=2, ep=2, etp=1),
        Layout(tp=2, ep=4, etp=1),
        Layout(pp=2, vpp=2, ep=2),
        Layout(tp=2, ep=2, etp=2),
    ],
    ids=str,
)
def test_more_layouts(layout):
    compare_all(
        {
            "DeepSeek": make_case(layout, **DEEPSEEK),
            "no query rank": make_case(layout, **(DEEPSEEK | NO_QUERY_RANK)),
            "no norms": make_case(layout, **YARN, qk_layernorm=False, num_layers=4),
        }
    )
