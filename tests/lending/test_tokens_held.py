"""Under heavy skew no rank holds more tokens than under balanced routing: memory stays flat."""

import pytest
from megatron.core.transformer.moe.moe_layer import MoELayer

from megatron_llep.integration.convert import convert_model
from support.layout import Layout
from support.llep import EAGER
from support.ranks import run_ranks
from support.routing import Routing
from support.training import Chunks, Run, train


def find_most_tokens_held(layout: Layout, pattern: str, *, llep: bool) -> int:
    """The most tokens that arrive at one rank's experts, over all layers and micro-batches."""
    run = Run(
        layout=layout,
        routing=Routing(pattern, ranks=layout.ep),
        steps=1,
        micro_batches=2 * layout.data_parallel,
        # 160 tokens a micro-batch of which 19 in 20 go to one expert.
        sequence_length=80,
        config={"moe_router_topk": 1, "moe_router_pre_softmax": True},
    )

    def work(rank, size):
        held: list[int] = []

        def watch(chunks: Chunks) -> None:
            if llep:
                convert_model(chunks, EAGER)
            for chunk in chunks:
                for module in chunk.modules():
                    if isinstance(module, MoELayer):
                        note_arrivals(module.token_dispatcher, held)

        train(run, transform_model=watch)
        return max(held)

    return max(run_ranks(work, layout.world_size))


def note_arrivals(dispatcher, held: list[int]) -> None:
    """Of Megatron's dispatcher, and of LLEP's where something is lent."""
    arrive, sort = dispatcher.dispatch_postprocess, getattr(dispatcher, "sort_by_slot", None)

    def arrive_and_note(*args):
        tokens, *rest = arrive(*args)
        held.append(len(tokens))
        return tokens, *rest

    def sort_and_note(*args):
        rows = sort(*args)
        held.append(sum(len(tokens) for tokens, _ in rows))
        return rows

    dispatcher.dispatch_postprocess = arrive_and_note
    dispatcher.sort_by_slot = sort_and_note


@pytest.mark.parametrize("layout", [Layout(ep=2), Layout(ep=4), Layout(tp=2, ep=2, etp=2)], ids=str)
def test_at_95_percent_skew(layout):
    balanced = find_most_tokens_held(layout, "balanced", llep=False)
    plain = find_most_tokens_held(layout, "hot", llep=False)
    lending = find_most_tokens_held(layout, "hot", llep=True)
    assert plain >= 0.95 * layout.ep * balanced
    assert lending <= 1.05 * balanced
