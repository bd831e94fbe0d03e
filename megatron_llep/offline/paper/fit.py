"""The fixed cost of a layer that lends: fitted on one half of the points, tested on the other.

The published code plans in Python from counts that it reads from the GPU one by one, sends every
expert in four messages, and waits at a barrier before that: milliseconds that depend on none of the
figures' axes. So the law has one unknown, the seconds c that every layer that lends takes besides
what the cost model says.
"""

from collections.abc import Iterable, Mapping
from itertools import accumulate

from megatron_llep.offline.paper.figures import Figure, Point, Setting
from megatron_llep.offline.paper.predict import Prediction


def split_halves(figures: Iterable[Figure]) -> tuple[list[Point], list[Point]]:
    """Points to fit and points to test, as the fields of a chessboard.

    So both are in every row and column. The first field of each figure is fitted.
    """
    halves: tuple[list[Point], list[Point]] = ([], [])
    for figure in figures:
        for i, row in enumerate(figure.rows.values()):
            for j, point in enumerate(row):
                halves[(i + j) % 2].append(point)
    return halves


def fit_fixed_seconds(points: Iterable[Point], predictions: Mapping[Setting, Prediction]) -> float:
    """The c of least sum of |method + c - t| / t, with t the plain layer's seconds / speed-up.

    That is the median of t - method, weighted with 1 / t, or 0 if it is negative. Points at which
    nothing is lent say nothing. The sum of absolute errors, and not of squares, as some points are
    far from any c.

    Args:
        points: measured.
        predictions: of their settings.

    Raises:
        ValueError: nothing is lent at any point.
    """
    missing = []
    for point in points:
        prediction = predictions[point.setting]
        if prediction.lends:
            seconds = prediction.plain_seconds / point.speedup
            missing.append((seconds - prediction.method_seconds, 1 / seconds))
    if not missing:
        raise ValueError("no point lends an expert: give points of skewed routings")
    missing.sort()
    half = sum(weight for _, weight in missing) / 2
    so_far = accumulate(weight for _, weight in missing)
    median = next(c for (c, _), weight in zip(missing, so_far, strict=True) if weight >= half)
    return max(median, 0.0)
