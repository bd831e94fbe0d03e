"""Shrunk recipes train to the same losses with LLEP as without it."""

import pytest
from recipe_data import load_recipes
from recipe_runs import make_run
from shrink import read_layout, shrink
from start_up import make_startable

from megatron_llep.device.latent_projection import prepare_latent_projections
from megatron_llep.offline.launch.flags import Flags
from support.layout import Layout
from support.parity import Case, compare_all

RECIPES = load_recipes()
# A layout each; together: every parallel size, groups of experts, bias, shared experts, windows and
# sinks, multi-token prediction, recompute, sharded and overlapped optimizers.
HANDFUL = [
    "deepseek_v3_h100_fp8",
    "gpt3_moe_mcore_te_tp4_ep2_etp2_pp2_resume_torch_dist_dist_optimizer",
    "gpt_oss_20b_h100_fp8",
    "qwen3_235b_a22b_h100_32k",
    "qwen3_30b_a3b_h100_full_recompute",
]
# Adam divides by what it has seen of a gradient, and so magnifies rounding where that is little:
# where it takes next to no step (--lr 1e-12), all agree to 1e-5.
GRADIENT_TOLERANCE = 1e-3


@pytest.fixture(autouse=True, scope="module")
def projections():
    prepare_latent_projections()


@pytest.mark.parametrize("name", HANDFUL)
def test_a_recipe_trains_to_the_same_losses(name):
    train_all([name])


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("family", sorted({recipe.family for recipe in RECIPES.values()}))
def test_all_recipes_of_a_family_train_to_the_same_losses(family):
    train_all([name for name, recipe in RECIPES.items() if recipe.family == family])


def train_all(names: list[str]) -> None:
    """Train each recipe, shrunk, plain and with LLEP; those of a layout together.

    Recipes that differ only in what a small one goes without are trained once.
    """
    layouts: dict[Layout, dict[str, Flags]] = {}
    for name in names:
        small = shrink(make_startable(RECIPES[name].flags))
        alike = layouts.setdefault(read_layout(small), {})
        if small not in alike.values():
            alike[name] = small
    for recipes in layouts.values():
        cases = {
            name: Case(make_run(small), loss_tolerance=1e-5, gradient_tolerance=GRADIENT_TOLERANCE)
            for name, small in recipes.items()
        }
        compare_all(cases, timeout=300)
