"""Many draws, those of one layout after each other."""

from collections.abc import Iterator
from itertools import groupby

from chaos_draws.compare import Disturb
from chaos_draws.crew import Crew, Outcome
from chaos_draws.draw import Draw, make_draw


def run_draws(
    seed: int, numbers: range, *, limit: float, disturb: Disturb | None = None
) -> Iterator[Outcome]:
    """Run the draws of a seed; outcomes as they come, by world size and layout.

    Args:
        seed: of all draws.
        numbers: which.
        limit: seconds after which a draw is a hang.
        disturb: see `compare`.
    """
    draws = sorted((make_draw(seed, number) for number in numbers), key=_order)
    for world_size, alike in groupby(draws, key=lambda draw: draw.layout.world_size):
        with Crew(world_size, limit=limit, disturb=disturb) as crew:
            for draw in alike:
                yield crew.run(draw)


def _order(draw: Draw) -> tuple[int, str, int]:
    return draw.layout.world_size, str(draw.layout), draw.number
