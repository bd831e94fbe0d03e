"""What all ranks know of one layer and micro-batch when their counts are together.

Letters: P ranks that share tokens, E experts.
"""

from dataclasses import dataclass

import numpy as np

from megatron_llep.planner import Plan


@dataclass(frozen=True, kw_only=True, eq=False)
class SeenLayer:
    """One layer's routing in one micro-batch of training."""

    layer: int
    """From 0 over the whole model; multi-token prediction layers last."""
    micro_batch: int
    """Of this rank, within the step."""
    counts: np.ndarray
    """int64 [P, E], (token, expert) pairs that each rank routes to each expert."""
    plan: Plan | None = None
    """What ran; None where plain expert parallelism did."""
