"""All figures beside their predictions, as the cost model is and with the fitted fixed cost."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from megatron_llep.offline.calibration.fit import find_errors
from megatron_llep.offline.paper.figures import FITTED, OTHERS, Figure, Point, Setting
from megatron_llep.offline.paper.fit import fit_fixed_seconds, split_halves
from megatron_llep.offline.paper.predict import Prediction, predict
from megatron_llep.planner.cost.model import CostModel


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How predictions compare with what was measured."""

    median: float
    """Of |predicted / measured - 1|."""
    worst: float
    above: int
    """Points at which more is predicted than was measured."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Predictions for all figures."""

    cost: CostModel
    predictions: Mapping[Setting, Prediction]
    fixed_seconds: float
    """Fitted."""

    def speedups(self, point: Point) -> tuple[float, float]:
        """Predicted: as the cost model is, and with the fixed cost."""
        prediction = self.predictions[point.setting]
        as_it_is = prediction.speedup(self.cost.planning_seconds)
        return as_it_is, prediction.speedup(self.fixed_seconds)

    def agree(self, points: Iterable[Point]) -> tuple[Agreement, Agreement]:
        """Both predictions beside these points."""
        points = list(points)
        measured = [point.speedup for point in points]
        as_it_is, fixed = zip(*map(self.speedups, points), strict=True)
        return _agree(as_it_is, measured), _agree(fixed, measured)


def compare(cost: CostModel, figures: Iterable[Figure] = (*FITTED, *OTHERS)) -> Comparison:
    """Predict every point of the figures, and fit the fixed cost on its half of `FITTED`."""
    points = [point for figure in (*FITTED, *figures) for point in figure.points]
    predictions: dict[Setting, Prediction] = {}
    for point in points:
        if point.setting not in predictions:
            predictions[point.setting] = predict(point.setting, cost)
    fitted, _ = split_halves(FITTED)
    return Comparison(
        cost=cost,
        predictions=predictions,
        fixed_seconds=fit_fixed_seconds(fitted, predictions),
    )


def _agree(predicted: Iterable[float], measured: list[float]) -> Agreement:
    predicted = list(predicted)
    median, worst = find_errors(predicted, measured)
    above = sum(p > m for p, m in zip(predicted, measured, strict=True))
    return Agreement(median=median, worst=worst, above=above)
