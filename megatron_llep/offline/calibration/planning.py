"""How long a plan takes on the host."""

import numpy as np

from megatron_llep.offline.timing import median_seconds
from megatron_llep.planner import list_exchange, make_plan


def time_planning(*, num_ranks: int = 8, num_experts: int = 128, repeats: int = 30) -> float:
    """Median seconds to plan one skewed layer and to say which tokens go where."""
    generator = np.random.default_rng(0)
    popularity = generator.lognormal(sigma=1.0, size=num_experts)
    counts = generator.multinomial(8192, popularity / popularity.sum(), size=num_ranks)

    def plan() -> None:
        made = make_plan(counts, planner="exact", imbalance_threshold=0.0)
        list_exchange(made, counts, 0)

    return median_seconds(plan, repeats)
