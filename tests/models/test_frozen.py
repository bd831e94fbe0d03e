"""Models of which only a part trains: no gradient is returned where none is wanted."""

from collections.abc import Callable
from dataclasses import replace

import pytest
from megatron.core import parallel_state

from support.layout import Layout
from support.llep import EAGER
from support.parity import Case, compare_all
from support.training import Chunks, Run

RECOMPUTE = {
    "recompute_granularity": "selective",
    "recompute_modules": ["moe"],
}


def freeze(is_frozen: Callable[[str], bool]) -> Callable[[Chunks], None]:
    """Freeze the parameters whose name in the model satisfies the condition."""

    def prepare(chunks: Chunks) -> None:
        frozen = 0
        for chunk in chunks:
            for name, parameter in chunk.named_parameters():
                if is_frozen(name):
                    parameter.requires_grad = False
                    frozen += 1
        assert frozen or parallel_state.get_expert_model_parallel_rank() > 0

    return prepare


FROZEN: dict[str, Callable[[str], bool]] = {
    "experts": lambda name: ".experts." in name,
    "routers": lambda name: ".router." in name,
    "fc1 of the experts": lambda name: ".experts." in name and "linear_fc1" in name,
    "one expert of each rank": lambda name: "local_experts.1." in name,
    "experts of one layer": lambda name: ".layers.1." in name and ".experts." in name,
    "experts of one rank": lambda name: (
        ".experts." in name and parallel_state.get_expert_model_parallel_rank() == 0
    ),
    "first layer": lambda name: "embedding" in name or ".layers.0." in name,
    "all but experts": lambda name: ".experts." not in name,
    "all but the second layer's experts": lambda name: (
        ".layers.1." not in name or ".experts." not in name
    ),
    "all but the output layer": lambda name: "output_layer" not in name,
    "experts and what is before them": lambda name: (
        "embedding" in name or ".layers.0." in name or ".experts." in name
    ),
}


@pytest.mark.parametrize(
    ("foreign_weights", "config"),
    [
        ("keep", {}),
        ("refetch", RECOMPUTE),
        pytest.param("keep", RECOMPUTE, marks=pytest.mark.slow),
        pytest.param("refetch", {}, marks=pytest.mark.slow),
    ],
    ids=["keep", "refetch-recomputed", "keep-recomputed", "refetch"],
)
def test_partly_frozen_models(foreign_weights, config):
    llep = replace(EAGER, foreign_weights=foreign_weights)
    compare_all(
        {
            name: Case(
                Run(layout=Layout(ep=2), config=config, prepare=freeze(is_frozen), steps=2), llep
            )
            for name, is_frozen in FROZEN.items()
        }
    )
