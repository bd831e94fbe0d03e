"""The table of docs/recipes.md, from the recipes and from what LLEP says of them.

PYTHONPATH=.:tests python tests/recipes/recipe_table.py
"""

import warnings
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path

DOC = Path(__file__).parents[2] / "docs" / "recipes.md"
BEGIN = "<!-- made by tests/recipes/recipe_table.py -->"


def build_table(refused: Mapping[str, list[str]]) -> str:
    """Markdown: a table for each family of models.

    Args:
        refused: by a recipe's name, the flags that LLEP refuses of it, if any.
    """
    from recipe_data import load_recipes
    from shrink import name_given_up, read_layout, shrink

    lines: list[str] = []
    for family, group in groupby(load_recipes().values(), key=lambda recipe: recipe.family):
        lines += ["", f"## {family}", ""]
        lines += [
            _row("recipe", "source", "starts", "trained here", "given up"),
            _row(*["---"] * 5),
        ]
        for recipe in group:
            flags = refused[recipe.name]
            starts = "yes" if not flags else "no: " + " ".join(f"`{flag}`" for flag in flags)
            small = shrink(recipe.flags)
            trained, given_up = describe_layout(small), "; ".join(name_given_up(recipe.flags))
            if not flags and read_layout(small).ep == 1:
                starts = "yes, as plain Megatron: one expert-parallel rank"
            lines += [_row(f"`{recipe.name}`", recipe.source, starts, trained, given_up)]
    return "\n".join(lines) + "\n"


def describe_layout(flags: Mapping[str, object]) -> str:
    """The sizes of a shrunk recipe's layout that are not one."""
    from shrink import read_layout

    layout = read_layout(dict(flags))
    sizes = {"TP": layout.tp, "PP": layout.pp, "VPP": layout.vpp or 1, "CP": layout.cp}
    sizes |= {"EP": layout.ep, "ETP": layout.expert_tp, "DP": layout.data_parallel}
    return " ".join(f"{name}{size}" for name, size in sizes.items() if size > 1) or "one rank"


def read_doc() -> tuple[str, str]:
    """The written part of the document, and the table in it."""
    written, _, table = DOC.read_text(encoding="utf-8").partition(BEGIN + "\n")
    return written, table


def main() -> None:
    """Write the table anew."""
    from megatron_llep.device import use_cpu_if_no_gpu

    warnings.simplefilter("ignore")
    use_cpu_if_no_gpu()  # before anything imports Megatron
    from recipe_data import load_recipes
    from start_up import list_refused_flags

    refused = {name: list_refused_flags(each.flags) for name, each in load_recipes().items()}
    written, _ = read_doc()
    DOC.write_text(f"{written}{BEGIN}\n{build_table(refused)}", encoding="utf-8")


def _row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
