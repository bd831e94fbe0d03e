"""Placement: a source's tokens -> the physical slots that the plan gives them.

A pair's *physical slot* is `rank * (M + S) + slot`. For each expert the plan tells how many of
this rank's pairs go to each holder; pairs of one expert are given out in token order. Pairs of one
(expert, holder) therefore stay together, as a *chunk*, and placing tokens means reordering chunks:
no sort over tokens is needed.

    list_pairs     routing map -> pairs by expert       needs no plan: runs while counts travel
    TokenExchange  plan -> chunks by slot, and sizes    on the host
    place_tokens   pairs, chunks -> order of sending
    gather_rows    tokens -> rows in that order, and sum_rows back
    order_by_slot  plan -> order of the rows that arrive
    split_by_slot  rows that arrived -> rows by slot, and join_by_source back

What handles pairs one by one is Triton kernels on GPUs, where they also sum rows, and loops of
`planner.loops` on a CPU; all else is torch operators.
"""

from megatron_llep.placement.arrivals import join_by_source, order_by_slot, split_by_slot
from megatron_llep.placement.pairs import Pairs, Placement
from megatron_llep.placement.rows import gather_rows, sum_rows
from megatron_llep.placement.tokens import list_pairs, place_tokens

__all__ = [
    "Pairs",
    "Placement",
    "gather_rows",
    "join_by_source",
    "list_pairs",
    "order_by_slot",
    "place_tokens",
    "split_by_slot",
    "sum_rows",
]
