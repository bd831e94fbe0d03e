"""Published MoE recipes, and which of their flags LLEP refuses when `--moe-llep` alone is added."""

import pytest
from recipe_data import load_recipes
from recipe_table import build_table, read_doc
from start_up import list_refused_flags, make_startable, start_up_checks

RECIPES = load_recipes()

WITH_HISTORY = RECIPES["deepseek_v3_gb200_mxfp8"].flags | {"--fp8-recipe": "delayed"}


@pytest.fixture(scope="module")
def refused() -> dict[str, list[str]]:
    return {name: list_refused_flags(recipe.flags) for name, recipe in RECIPES.items()}


def test_the_table_says_what_starts(refused):
    _, table = read_doc()
    assert table == build_table(refused), "run tests/recipes/recipe_table.py"


def test_a_refusal_names_a_flag_of_the_recipe_and_what_to_do():
    refusals = start_up_checks(WITH_HISTORY)
    assert refusals
    for refusal in refusals:
        flag, _, remedy = refusal.partition(":")
        assert flag.split()[0] in WITH_HISTORY
        assert "use --" in remedy or "leave the flag out" in remedy


def test_what_is_left_of_a_recipe_starts():
    left = make_startable(WITH_HISTORY)
    assert start_up_checks(left) == []
    assert left["--num-experts"] == 256
