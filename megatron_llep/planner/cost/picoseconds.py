"""Times as whole picoseconds: their sums and comparisons come out alike on every CPU.

A sum of floats depends on its order, and that on a CPU's vector width. Here every time is computed
by itself, which IEEE 754 fixes to the last bit, and rounded before it meets others.
"""

import numpy as np

PER_SECOND = 10**12

_MOST = 2.0**60
"""13 days, in picoseconds. A time above it counts as this: a few of them fit into an int64."""


def to_picoseconds(seconds: float) -> int:
    """Whole picoseconds."""
    return round(min(seconds * PER_SECOND, _MOST))


def all_to_picoseconds(seconds: np.ndarray) -> np.ndarray:
    """Whole picoseconds of each, int64."""
    return np.rint(np.minimum(seconds * PER_SECOND, _MOST)).astype(np.int64)
