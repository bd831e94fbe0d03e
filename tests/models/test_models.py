"""What models are made of: LLEP trains each of them as plain expert parallelism does."""

import pytest
import torch
from megatron.core.fusions.fused_bias_geglu import quick_gelu

from megatron_llep.layer import LLEPMoELayer
from support.layout import Layout
from support.llep import EAGER, train_with_llep
from support.parity import Case, compare_all
from support.ranks import run_ranks
from support.routing import Routing
from support.training import Run, train
from support.versions import needs_megatron

EP2 = Layout(ep=2)
BF16 = {"bf16": True, "params_dtype": torch.bfloat16, "pipeline_dtype": torch.bfloat16}
BF16_OPTIMIZER = {"bf16": True, "params_dtype": torch.bfloat16}
STEPS = 3

GPT_OSS = {
    "activation_func": quick_gelu,
    "add_bias_linear": True,
    "glu_linear_offset": 1.0,
    "activation_func_clamp_value": 0.5,  # low, so that it cuts
}
SIGMOID = {
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_router_bias_update_rate": 0.05,
    "moe_router_topk_scaling_factor": 2.5,
    "moe_router_dtype": "fp32",
}
GROUPS = {"moe_router_num_groups": 4, "moe_router_group_topk": 2, "moe_router_topk": 4}


def cases(**configs: dict) -> dict[str, Case]:
    return {
        name: Case(Run(layout=EP2, steps=STEPS, config=config)) for name, config in configs.items()
    }


ACTIVATIONS = cases(
    gpt_oss=GPT_OSS,
    gpt_oss_fused=GPT_OSS | {"bias_activation_fusion": True},
    swiglu_fused={"bias_activation_fusion": True},
    gelu_with_biases={
        "activation_func": torch.nn.functional.gelu,
        "gated_linear_unit": False,
        "add_bias_linear": True,
    },
)
ROUTERS = cases(
    sigmoid=SIGMOID,
    sigmoid_groups=SIGMOID | GROUPS | {"moe_router_pre_softmax": True},
    groups=GROUPS,
    softmax_before={"moe_router_pre_softmax": True, "moe_router_topk_scaling_factor": 2.0},
    softmax_after={"moe_router_pre_softmax": False},
    probabilities_on_input={
        "moe_apply_probs_on_input": True,
        "moe_router_pre_softmax": True,
        "moe_router_topk": 1,
    },
    fp32={"moe_router_dtype": "fp32"},
    fp64={"moe_router_dtype": "fp64"},
    aux_loss={
        "moe_router_load_balancing_type": "aux_loss",
        "moe_aux_loss_coeff": 0.1,
        "moe_z_loss_coeff": 0.1,
    },
    seq_aux_loss={"moe_router_load_balancing_type": "seq_aux_loss", "moe_aux_loss_coeff": 0.1},
    jitter={"moe_input_jitter_eps": 0.1},
    forced_bias={"moe_router_force_biased": 1.0},
)
LAYERS = cases(
    dense_first={"num_layers": 3, "moe_layer_freq": [0, 1, 1]},
    dropout={"hidden_dropout": 0.1, "attention_dropout": 0.1},
    per_token_loss={"calculate_per_token_loss": True},
    shared_experts_with_gate={
        "moe_shared_expert_intermediate_size": 32,
        "moe_shared_expert_gate": True,
    },
    # Megatron's log of these layers' losses has the size that it had at first.
    prediction={"mtp_num_layers": 2},
)
EMBEDDINGS = {
    f"{name}": Case(Run(layout=EP2, steps=STEPS, config=config, tied_embeddings=True))
    for name, config in {"tied": {}, "tied_prediction": {"mtp_num_layers": 1}}.items()
}


@pytest.mark.parametrize(
    "group",
    [ACTIVATIONS, ROUTERS, LAYERS, EMBEDDINGS],
    ids=["activations", "routers", "layers", "embeddings"],
)
def test_every_model(group):
    compare_all(group)


@needs_megatron((0, 19), "recompute of prediction layers")
def test_prediction_layers_recomputed():
    config = {
        "mtp_num_layers": 2,
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    }
    compare_all(cases(recomputed=config))


def test_bf16_models_with_a_router_in_higher_precision():
    # Forced routing: near ties go either way in bf16.
    compare_all(
        {
            dtype: Case(
                Run(
                    layout=EP2,
                    routing=Routing("hot"),
                    config=BF16 | {"moe_router_dtype": dtype},
                    optimizer=BF16_OPTIMIZER,
                ),
                loss_tolerance=5e-3,
                gradient_tolerance=3e-2,
            )
            for dtype in ("fp32", "fp64")
        }
    )


def test_the_expert_bias_follows_the_routing():
    """The bias counts tokens by the expert that they chose, wherever they were computed."""

    def work(rank, size):
        run = Run(layout=EP2, steps=STEPS, config=SIGMOID)
        plain, lending = train(run), train_with_llep(run)
        biases = [name for name in plain.buffers if name.endswith("expert_bias")]
        assert len(biases) == 2
        for name in biases:
            assert plain.buffers[name].abs().max() > 0
            assert torch.equal(plain.buffers[name], lending.buffers[name])

    run_ranks(work, 2)


@pytest.mark.parametrize("seam", ["model", "spec"])
def test_only_the_model_hook_reaches_prediction_layers(seam):
    def work(rank, size):
        kinds = []

        def look(chunks):
            for name, module in chunks[0].named_modules():
                if name.startswith("mtp.") and name.endswith(".mlp"):
                    kinds.append(module)

        run = Run(layout=EP2, steps=1, config={"mtp_num_layers": 1}, prepare=look)
        train_with_llep(run, EAGER, seam)
        return [isinstance(layer, LLEPMoELayer) for layer in kinds]

    # Megatron derives the specification of these layers by itself.
    assert run_ranks(work, 2) == [[seam == "model"]] * 2
