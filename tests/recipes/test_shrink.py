"""What a recipe keeps when it is made small, and what it loses."""

import pytest
from recipe_data import load_recipes
from shrink import name_given_up, read_layout, shrink

from support.layout import Layout

RECIPES = load_recipes()
ROUTING = (
    "--moe-router-topk",
    "--moe-router-num-groups",
    "--moe-router-group-topk",
    "--moe-router-score-function",
    "--moe-router-enable-expert-bias",
    "--moe-router-load-balancing-type",
    "--moe-aux-loss-coeff",
)


@pytest.mark.parametrize("name", RECIPES)
def test_a_shrunk_recipe_is_routed_as_before_on_eight_ranks_at_most(name):
    flags = RECIPES[name].flags
    small = shrink(flags)
    layout = read_layout(small)
    assert {flag: small.get(flag) for flag in ROUTING} == {f: flags.get(f) for f in ROUTING}
    assert layout.world_size <= 8
    assert small["--num-experts"] % layout.ep == 0
    assert small["--num-experts"] >= 2 * layout.ep or layout.ep == flags["--num-experts"]
    assert small["--global-batch-size"] % (2 * layout.data_parallel) == 0
    whole = read_layout(flags)
    for size in ("tp", "pp", "ep", "cp", "expert_tp"):
        assert (getattr(layout, size) > 1) == (getattr(whole, size) > 1), size


def test_a_large_layout_is_halved_until_it_fits():
    layout = read_layout(shrink(RECIPES["deepseek_v3_h100_fp8"].flags))
    assert layout == Layout(tp=2, pp=4, vpp=2, ep=2, etp=1, dp=1)


def test_what_is_given_up_is_named():
    assert name_given_up({"--fp8-format": "e4m3", "--num-layers": 2}) == ["FP8"]
    assert name_given_up({"--fp8-format": None, "--bf16": True}) == []


def test_experts_stay_a_choice_in_whole_groups():
    small = shrink(RECIPES["deepseek_v3_h100_fp8"].flags)
    assert small["--num-experts"] == 16  # of 256: twice top-8, two to each of 8 groups
    small = shrink(RECIPES["nemotron_3_super_h100"].flags)
    assert small["--num-experts"] == 48  # twice top-22, as many on 8 ranks


def test_a_pattern_keeps_its_first_layers_and_its_depths():
    small = shrink(RECIPES["nemotron_3_super_h100"].flags)
    assert small["--hybrid-layer-pattern"] == "*E*E/*E/*E"
    assert small["--moe-latent-size"] == 16
    assert "--num-layers" not in small
