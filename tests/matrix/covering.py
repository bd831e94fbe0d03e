"""A small sample of all combinations in which every pair of values occurs."""

import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Row = dict[str, Any]
_TRIES = 60


def cover_pairs(
    factors: Mapping[str, Sequence[Any]], is_allowed: Callable[[Row], bool], seed: int = 0
) -> list[Row]:
    """Rows that hold every pair of values of two factors that an allowed row can hold.

    Greedy: for a pair not seen yet, the one of some random completions with most new pairs. Which
    rows come out depends on `seed` alone.
    """
    draw = random.Random(seed)
    names = list(factors)
    missing = [
        ((a, x), (b, y))
        for a, b in itertools.combinations(names, 2)
        for x, y in itertools.product(factors[a], factors[b])
    ]
    draw.shuffle(missing)
    rows: list[Row] = []
    while missing:
        best: Row | None = None
        for _ in range(_TRIES):
            row = {name: draw.choice(factors[name]) for name in names} | dict(missing[0])
            if is_allowed(row) and (best is None or _count(row, missing) > _count(best, missing)):
                best = row
        if best is None:  # no allowed row holds this pair
            missing.pop(0)
            continue
        rows.append(best)
        missing = [pair for pair in missing if not _holds(best, pair)]
    return rows


def _holds(row: Row, pair: Sequence[tuple[str, Any]]) -> bool:
    return all(row[name] == value for name, value in pair)


def _count(row: Row, pairs: list) -> int:
    return sum(_holds(row, pair) for pair in pairs)
