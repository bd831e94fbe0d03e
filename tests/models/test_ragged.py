"""Token counts that differ between ranks, micro-batches and steps."""

from dataclasses import replace

import pytest
import torch

from support.layout import Layout
from support.llep import EAGER
from support.parity import Case, compare_all
from support.routing import Routing
from support.training import Run, make_tokens

LENGTHS = (16, 4, 11, 1, 7, 20, 3)


def make_ragged_tokens(run: Run, step: int, micro_batch: int) -> torch.Tensor:
    """Token ids [b, s + 1], with another b and s for every step and micro-batch."""
    number = 5 * step + micro_batch
    return make_tokens(
        replace(
            run,
            sequence_length=LENGTHS[number % len(LENGTHS)],
            micro_batch_size=1 + number % 3,
        ),
        step,
        micro_batch,
    )


@pytest.mark.parametrize("foreign_weights", ["keep", "refetch"])
def test_ragged_token_counts(foreign_weights):
    llep = replace(EAGER, foreign_weights=foreign_weights)
    run = Run(layout=Layout(ep=2), steps=4, tokens=make_ragged_tokens)
    recomputed = {"recompute_granularity": "selective", "recompute_modules": ["moe"]}
    compare_all(
        {
            "natural": Case(run, llep),
            "hot": Case(replace(run, routing=Routing("hot")), llep),
            "recomputed": Case(replace(run, config=recomputed), llep),
        }
    )


def test_ragged_steps_through_a_pipeline():
    run = Run(
        layout=Layout(pp=2, ep=2),
        steps=4,
        tokens=make_ragged_tokens,
        config={"variable_seq_lengths": True},
    )
    compare_all({"pipeline": Case(run)})
