"""Arithmetic on curves: smoothing, difference, targets."""

import numpy as np
import pytest
from run_logs import make_curve, make_loss

from megatron_llep.offline.compare.comparison import Metric, compare_runs
from megatron_llep.offline.compare.curves import (
    common_target,
    difference,
    find_target,
    is_falling,
    smooth_curve,
)
from megatron_llep.offline.compare.run_log import RunLog


def test_smoothing_is_the_mean_of_the_last_values():
    smooth = smooth_curve(make_curve(np.array([1, 2, 3, 4, 5.0])), 3)
    assert smooth.values.tolist() == [1, 1.5, 2, 3, 4]
    assert smooth.steps.tolist() == [1, 2, 3, 4, 5]


def test_smoothing_does_not_hide_nan_nor_spread_it():
    smooth = smooth_curve(make_curve(np.array([1, np.nan, 3, 4, 5.0])), 2)
    assert np.isnan(smooth.values).tolist() == [False, True, True, False, False]


@pytest.mark.parametrize(
    ("reference", "other", "relative", "absolute"),
    [
        (2.0, 2.02, 0.01, 0.02),
        (-2.0, -2.02, -0.01, -0.02),
        (0.0, 0.0, 0.0, 0.0),
        (0.0, 0.5, np.inf, 0.5),
        (np.nan, np.nan, np.inf, np.inf),
        (1.0, np.nan, np.inf, np.inf),
        (np.inf, np.inf, np.inf, np.inf),
    ],
)
def test_difference(reference, other, relative, absolute):
    pair = np.array([reference]), np.array([other])
    assert difference(*pair, absolute=False) == pytest.approx(relative)
    assert difference(*pair, absolute=True) == pytest.approx(absolute)


def test_a_target_is_reached_from_above_or_from_below():
    falling, rising = make_curve(np.array([5, 3, 2, 4.0])), make_curve(np.array([0, 0.5, 0.9, 0.7]))
    assert find_target(falling, 3, falling=True).step == 2
    assert find_target(falling, 1, falling=True) is None
    assert find_target(rising, 0.9, falling=False).step == 3
    assert (is_falling(falling), is_falling(rising)) == (True, False)


def test_the_common_target_is_the_level_at_which_both_end():
    curves = [make_curve(np.linspace(6, end, 30)) for end in (2, 3)]
    assert common_target(curves, falling=True) == pytest.approx(3.1, abs=0.05)
    for curve in curves:
        assert find_target(curve, common_target(curves, falling=True), falling=True)


@pytest.mark.parametrize("target", [None, 3.0])
def test_the_paper_s_figure_is_found(target):
    """The same curve over steps in 1.25 times less wall time is 1.25 times sooner at any target."""
    curves = [make_curve(make_loss(), seconds) for seconds in (1.25, 1.0)]
    logs = [RunLog(name, name, {"lm loss": c}) for name, c in zip("ab", curves, strict=True)]
    race = compare_runs(*logs, [Metric(name="lm loss", target=target)]).results[0].race
    assert race.speedup == pytest.approx(1.25)
    assert race.reference.step == race.other.step


def test_a_target_that_one_run_misses_has_no_speedup():
    logs = [
        RunLog(name, name, {"accuracy": make_curve(np.linspace(0, end, 20))})
        for name, end in (("a", 0.95), ("b", 0.85))
    ]
    race = compare_runs(*logs, [Metric(name="accuracy", target=0.89)]).results[0].race
    assert race.reference.step == 19
    assert race.other is None
    assert race.speedup is None
