"""The simulator: what must hold between methods, and its sums by hand."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from megatron_llep.offline.simulator import METHODS, MODELS, Case, ModelShape, get_model, simulate
from megatron_llep.offline.simulator.layers import count_attention_weights, count_layers
from megatron_llep.offline.workloads import make_counts
from megatron_llep.planner.cost.link import Link
from megatron_llep.planner.cost.model import EXCHANGES, CostModel, LayerShape
from megatron_llep.planner.cost.presets import get_cost_model
from megatron_llep.planner.topology import Topology

CONFIGS = Path(__file__).resolve().parents[3] / "configs"


def make_case(workload, P=8, model="gpt-oss-120b", **changes):
    shape = get_model(model)

    def counts(layer, step):
        return make_counts(
            workload,
            num_ranks=P,
            num_experts=shape.layer.num_experts,
            tokens_per_rank=8192,
            top_k=shape.layer.top_k,
            seed=layer,
            step=step,
        )

    options = {"steps": 2, "replace_every": 2, "layers": 2} | changes
    return Case(
        model=shape,
        cost=get_cost_model("h200"),
        topology=Topology(),
        make_counts=counts,
        **options,
    )


@pytest.mark.parametrize("name", MODELS)
def test_built_in_models_are_those_of_configs(name):
    from_file = get_model(str(CONFIGS / f"{name}.yaml"))
    built_in = MODELS[name]
    assert dataclasses.replace(from_file, tokens_per_rank=built_in.tokens_per_rank) == built_in


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_is_a_model(path):
    model = get_model(str(path))
    assert model.moe_layers > 0
    assert model.layer.gated == (path.stem != "nemotron-3-super")
    assert model.other_flops_per_token > 0


def test_model_sizes_against_published_ones():
    # Weights that a token meets, without embedding: 2 FLOPs each, and attention scores besides.
    # Published: 5.1 billion active of gpt-oss-120b, 37 of DeepSeek-V3, 32 of Kimi-K2.
    for name, active in (("gpt-oss-120b", 5.1e9), ("deepseek-v3", 37e9), ("kimi-k2", 32e9)):
        model = MODELS[name]
        experts = model.moe_layers * model.layer.top_k * model.layer.expert_weights
        weights = experts + model.other_flops_per_token / 2
        assert weights == pytest.approx(active, rel=0.15)
    # All routed experts of DeepSeek-V3: 671 billion in all, the rest is attention and dense layers.
    v3 = MODELS["deepseek-v3"]
    assert 640e9 < v3.moe_layers * v3.layer.num_experts * v3.layer.expert_weights < 671e9


def test_a_hybrid_model_with_latent_experts_against_published_sizes():
    # 120 billion weights, of which a token meets 12, with an embedding it does not multiply.
    model = get_model(str(CONFIGS / "nemotron-3-super.yaml"))
    assert model.moe_layers == 40
    assert model.layer.token_bytes == 1024 * 2
    experts = model.moe_layers * model.layer.expert_weights
    active = model.layer.top_k * experts + model.other_flops_per_token / 2
    assert active == pytest.approx(12e9, rel=0.1)
    others = model.other_flops_per_token / 2 + 131072 * 4096
    assert model.layer.num_experts * experts + others == pytest.approx(120e9, rel=0.02)


def test_layers_of_a_pattern():
    assert count_layers({"hybrid-layer-pattern": "*E-|+DMG/*E/*E"}) == {
        "attention": 3,
        "moe": 1,
        "dense": 1,
        "mamba": 1,
        "gdn": 1,
    }
    with pytest.raises(ValueError, match="--hybrid-layer-pattern XE: X is no layer"):
        count_layers({"hybrid-layer-pattern": "XE"})


def test_unknown_models_and_methods():
    with pytest.raises(ValueError, match="'gpt-5' is unknown: choose one of gpt-oss-120b"):
        get_model("gpt-5")
    with pytest.raises(ValueError, match="method 'best' is unknown"):
        simulate(make_case("balanced"), ("best",))


def test_model_file_without_a_flag(tmp_path):
    path = tmp_path / "model.yaml"
    path.write_text("MODEL_ARGS:\n  --hidden-size: 8\n")
    with pytest.raises(ValueError, match=r"model\.yaml: 'seq-length' is missing"):
        get_model(str(path))
    path.write_text("- a list\n")
    with pytest.raises(ValueError, match=r"model\.yaml has no MODEL_ARGS"):
        get_model(str(path))


def test_balanced_lends_nothing_and_costs_nothing():
    outcomes = simulate(make_case("balanced"))
    for method in ("lla", "exact", "tolerant", "auto", "optimum"):
        assert outcomes[method] == outcomes["plain"]
    assert outcomes["plain"].expert_gigabytes == 0


@pytest.mark.parametrize("workload", ["lognormal-2", "hot-95-4", "rotating", "idle-ranks"])
def test_order_of_methods(workload):
    outcomes = simulate(make_case(workload))
    assert set(outcomes) == set(METHODS)
    plain, best = outcomes["plain"], outcomes["optimum"]
    assert plain.imbalance > 1.3
    for method, o in outcomes.items():
        assert best.layer.compute <= o.layer.compute * (1 + 1e-3), method
        assert best.imbalance <= o.imbalance + 1e-9
        assert o.layer.total == pytest.approx(
            sum(getattr(o.layer, f.name) for f in dataclasses.fields(o.layer))
        )
    for method in ("lla", "exact", "tolerant", "auto"):
        assert outcomes[method].layer.total < plain.layer.total
        assert outcomes[method].model_bytes < plain.model_bytes
    assert outcomes["auto"].layer.total <= outcomes["exact"].layer.total
    assert outcomes["tolerant"].imbalance <= 1.1 + 1e-9
    assert outcomes["tolerant"].transfers <= outcomes["exact"].transfers
    # The same replicas, spread better.
    assert outcomes["eplb+lp"].imbalance <= outcomes["eplb"].imbalance + 1e-9


def test_optimum_pays_nothing_for_lending():
    outcomes = simulate(make_case("lognormal-2"), ("plain", "exact", "optimum"))
    exact, best = outcomes["exact"], outcomes["optimum"]
    assert exact.layer.lending > 0
    assert exact.transfers > 0
    assert (best.layer.lending, best.layer.returning, best.layer.planning) == (0, 0, 0)
    assert best.layer.compute == exact.layer.compute
    assert (best.transfers, best.expert_gigabytes) == (0, 0)


def test_the_program_spreads_over_replicas_better_than_evenly():
    hot = np.full((8, 16), 10)
    hot[:, 0] = 1000
    case = dataclasses.replace(make_case("balanced"), make_counts=lambda layer, step: hot)
    outcomes = simulate(case, ("plain", "eplb", "eplb+lp"))
    assert outcomes["eplb"].imbalance > 1.5
    assert outcomes["eplb+lp"].imbalance < 1.05


def test_replicas_are_placed_anew():
    # Expert 0 is hot before step 4, expert 15 from then on. Replicas are placed before step 4, as
    # it starts, and at step 6, from the loads of steps 4 and 5.
    def counts(layer, step):
        loads = np.full((8, 16), 10)
        loads[:, 0 if step < 4 else 15] = 200
        return loads

    case = dataclasses.replace(make_case("balanced", layers=1), make_counts=counts)
    trailing = simulate(case, ("plain", "eplb+lp"))["eplb+lp"]
    caught_up = simulate(dataclasses.replace(case, steps=4), ("plain", "eplb+lp"))["eplb+lp"]
    assert trailing.transfers == 0
    assert trailing.layer.lending == 0
    assert caught_up.transfers > 0
    assert caught_up.layer.lending > 0
    assert caught_up.imbalance == pytest.approx((trailing.imbalance + 1) / 2, abs=0.05)


def test_eplb_trails_a_hot_spot_that_moves():
    steady, moving = (simulate(make_case(w), ("plain", "eplb")) for w in ("hot-50-4", "rotating"))
    assert steady["eplb"].imbalance < 1.2
    assert moving["eplb"].imbalance > 1.5


@pytest.mark.parametrize(
    ("rank", "of_queries"), [({"q-lora-rank": 3}, 8 * 3 + 3 * 14), ({}, 8 * 14)]
)
def test_latent_attention_by_hand(rank, of_queries):
    """Two heads, 5 + 2 wide, of values 4; queries go through their rank where they have one."""
    shape = {
        "hidden-size": 8,
        "num-attention-heads": 2,
        "multi-latent-attention": True,
        "kv-lora-rank": 6,
        "qk-head-dim": 5,
        "qk-pos-emb-head-dim": 2,
        "v-head-dim": 4,
    }
    of_keys_and_values = 8 * (6 + 2) + 6 * 2 * (5 + 4)
    output = 2 * 4 * 8
    assert count_attention_weights(shape | rank) == of_queries + of_keys_and_values + output


def test_by_hand():
    # Two ranks of two experts; all 600 pairs go to expert 0, 300 from each rank.
    shape = LayerShape(hidden=4, ffn_hidden=5, num_experts=4, top_k=1)
    assert (shape.expert_weights, shape.token_bytes) == (60, 8)
    model = ModelShape(name="m", moe_layers=3, layer=shape, other_flops_per_token=1000.0)
    link = Link(latency_seconds=0.0, bytes_per_second=1e3)
    cost = CostModel(
        machine="m",
        flops_per_second=1e6,
        half_rate_tokens=0.0,
        gemm_overhead_seconds=0.0,
        backward_factor=2.0,
        copy_bytes_per_second=1e12,
        intra_node=link,
        inter_node=link,
        overlap=0.0,
        planning_seconds=0.25,
    )
    case = Case(
        model=model,
        cost=cost,
        topology=Topology(),
        make_counts=lambda layer, step: np.array([[300, 0, 0, 0], [300, 0, 0, 0]]),
    )
    outcomes = simulate(case, ("plain", "exact"))
    plain, exact = outcomes["plain"], outcomes["exact"]
    pair_flops, pair_bytes = 2 * 60, 2 * (2 * 4 + 3 * 5)
    expert_bytes, gradient_bytes = 60 * 2, 60 * 4
    other = 300 * 1000.0 / 1e6 * 3

    assert plain.imbalance == 2.0
    assert plain.layer.compute == pytest.approx(600 * pair_flops / 1e6 * 3)
    assert plain.layer.exchange == pytest.approx(EXCHANGES * 300 * 8 / 1e3, rel=1e-6)
    assert plain.step_seconds == pytest.approx(3 * plain.layer.total + other)
    assert plain.layer_bytes == 600 * pair_bytes
    assert plain.model_bytes == 3 * 600 * pair_bytes
    assert plain.token_gigabytes == pytest.approx(EXCHANGES * 300 * 8 / 1e9)

    # Each rank keeps its own pairs: no token moves, expert 0 does, and its gradient.
    assert exact.layer.compute == pytest.approx(300 * pair_flops / 1e6 * 3)
    assert exact.layer.exchange == pytest.approx(0, abs=1e-6)
    assert exact.layer.lending == pytest.approx(expert_bytes / 1e3)
    assert exact.layer.returning == pytest.approx(gradient_bytes / 1e3)
    assert exact.layer.planning == 0.25
    assert exact.transfers == 1
    assert exact.layer_bytes == 300 * pair_bytes + expert_bytes + gradient_bytes
    assert exact.model_bytes == 3 * 300 * pair_bytes + 3 * expert_bytes + gradient_bytes
    layer = dataclasses.replace(shape, refetch=True)
    case = dataclasses.replace(case, model=dataclasses.replace(model, layer=layer))
    refetched = simulate(case, ("exact",))["exact"]
    assert refetched.model_bytes == 3 * 300 * pair_bytes + expert_bytes + gradient_bytes
    assert refetched.layer.lending == pytest.approx(2 * expert_bytes / 1e3)
    assert exact.expert_gigabytes == pytest.approx((expert_bytes + gradient_bytes) / 1e9)


def test_large_groups():
    case = make_case("lognormal-2", P=64, layers=1, steps=1)
    case = dataclasses.replace(case, topology=Topology(ranks_per_node=8))
    outcomes = simulate(case)
    assert outcomes["exact"].imbalance < 1.01
    assert outcomes["exact"].layer.total < outcomes["plain"].layer.total
