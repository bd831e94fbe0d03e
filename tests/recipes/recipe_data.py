"""Published training recipes as flags, from `data/`: one file per family of models."""

from dataclasses import dataclass
from pathlib import Path

import yaml

from megatron_llep.offline.launch.flags import Flags

DATA = Path(__file__).parent / "data"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One way to train one model."""

    name: str
    family: str
    source: str
    """Repository and path of the file that the flags are from."""
    flags: Flags


def load_recipes() -> dict[str, Recipe]:
    """All recipes, by name, in the order of the files."""
    recipes: dict[str, Recipe] = {}
    for path in sorted(DATA.glob("*.yaml")):
        for name, entry in yaml.safe_load(path.read_text(encoding="utf-8"))["recipes"].items():
            assert name not in recipes, f"two recipes are called {name}"
            recipes[name] = Recipe(
                name=name, family=path.stem, source=entry["source"], flags=entry["flags"]
            )
    return recipes
