"""The verdict on planted differences, and on runs that differ by rounding or noise only."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from run_logs import STEPS, make_curve, make_log, make_loss, rounded

from megatron_llep.offline.compare.comparison import Metric, compare_runs
from megatron_llep.offline.compare.table import format_verdict
from megatron_llep.offline.compare.verdict import Tolerance

LOSS = make_loss()
PLAIN = make_log("plain", lm_loss=LOSS)


def compare(values, control=None, tolerance=None, **options):
    metric = Metric(name="lm loss", tolerance=tolerance or Tolerance())
    if control is not None:
        control = make_log("control", lm_loss=control)
    return compare_runs(
        PLAIN, make_log("llep", lm_loss=values), [metric], control=control, **options
    )


def broken(comparison):
    return {check.name for check in comparison.judgements[0].checks if not check.ok}


def test_a_run_agrees_with_itself():
    comparison = compare(LOSS)
    assert comparison.agree
    assert comparison.judgements[0].apart.max() == 0
    assert "plain and llep agree" in format_verdict(comparison)


@settings(deadline=None)
@given(seed=st.integers(1, 10_000), growth=st.sampled_from([1e-7, 1e-5, 1e-3]))
def test_rounding_that_grows_agrees_with_and_without_control(seed, growth):
    llep, control = rounded(LOSS, seed, growth), rounded(LOSS, seed + 1, growth)
    assert compare(llep).agree
    assert compare(llep, control).agree


@settings(deadline=None)
@given(
    seed=st.integers(1, 10_000),
    growth=st.sampled_from([1e-6, 1e-3, 1e-1]),
    jump=st.integers(0, STEPS - 1),
    size=st.sampled_from([0, 2e-4, 1e-2, 1e-1]),
    with_control=st.booleans(),
)
def test_what_is_drawn_as_allowed_is_what_decides(seed, growth, jump, size, with_control):
    llep = rounded(LOSS, seed, growth) * (1 + size * (np.arange(STEPS) == jump))
    comparison = compare(llep, rounded(LOSS, seed + 1) if with_control else None)
    (found,) = comparison.judgements
    inside = bool((found.apart <= found.allowed).all())
    assert inside == (broken(comparison) <= {"average"})


def test_growth_may_begin_earlier_than_the_control_s():
    """At which step a tie is broken the other way is chance."""
    jump = np.where(np.arange(STEPS) >= 37, 2e-2, 1e-7)
    late = np.where(np.arange(STEPS) >= 67, 2e-2, 1e-7)
    assert compare(LOSS * (1 + jump), LOSS * (1 + late)).agree


def test_a_difference_that_the_control_never_shows_is_found():
    jump = np.where(np.arange(STEPS) >= 100, 5e-3, 1e-7)
    assert compare(LOSS * (1 + jump)).agree  # within the stated tolerance
    assert broken(compare(LOSS * (1 + jump), rounded(LOSS, 1, 1e-5))) == {"average"}
    spike = np.where(np.arange(STEPS) == 100, 2e-2, 1e-7)
    assert compare(LOSS * (1 + spike)).agree
    assert broken(compare(LOSS * (1 + spike), rounded(LOSS, 1, 1e-5))) == {"control"}


def test_one_token_that_takes_another_expert_is_no_difference():
    """As seen: LLEP's differences grew to 2e-3 by chance, the control's to 2e-5."""
    for seed in range(20):
        assert compare(rounded(LOSS, seed, 2e-3), rounded(LOSS, seed + 1, 2e-5)).agree


@pytest.mark.parametrize(
    "values",
    [
        pytest.param(LOSS * 1.005, id="shifted by 0.5%"),
        pytest.param(make_loss(speed=1.01), id="learning rate 1% higher"),
        pytest.param(make_loss() + 0.02 * np.sin(np.arange(STEPS)), id="other data"),
        pytest.param(LOSS * (1 + 4e-2 * (np.arange(STEPS) == 150)), id="one spike"),
        pytest.param(np.where(np.arange(STEPS) == 150, np.nan, LOSS), id="one NaN"),
        pytest.param(np.where(np.arange(STEPS) > 150, np.inf, LOSS), id="diverged"),
    ],
)
@pytest.mark.parametrize("with_control", [False, True])
def test_planted_differences_are_found(values, with_control):
    comparison = compare(values, rounded(LOSS, 1) if with_control else None)
    assert not comparison.agree
    assert "PLAIN AND LLEP DIFFER: lm loss" in format_verdict(comparison)


def test_a_shift_that_hides_in_noise_is_found_on_average():
    """Runs in bf16, say, whose every step is 0.3% apart: one step shows nothing, many do."""
    random = np.random.default_rng(2)
    noisy = [LOSS * (1 + 3e-3 * random.normal(size=STEPS)) for _ in range(2)]
    tolerance = Tolerance(early=1e-4, early_steps=0)
    assert compare(noisy[0], noisy[1], tolerance).agree
    shifted = compare(noisy[0] * 1.005, noisy[1], tolerance)
    assert broken(shifted) == {"average"}
    assert "on average" in format_verdict(shifted)


def test_another_seed_measures_what_two_good_runs_are_apart():
    random = np.random.default_rng(3)
    seeds = [LOSS * (1 + 1e-2 * random.normal(size=STEPS)) for _ in range(2)]
    apart = Tolerance(early_steps=0, overall=0.1)
    comparison = compare(seeds[0], seeds[1], apart)
    assert comparison.agree
    assert comparison.judgements[0].factor == 3
    assert compare(rounded(LOSS, 1), rounded(LOSS, 2)).judgements[0].factor == 10
    assert not compare(seeds[0] * 1.05, seeds[1], apart).agree


def test_the_stated_factor_is_taken():
    late = np.arange(STEPS) >= 100
    llep, control = LOSS * (1 + 8e-3 * late), LOSS * (1 + 2e-3 * late)
    assert compare(llep, control).agree
    assert not compare(llep, control, Tolerance(factor=1)).agree


def test_a_control_that_is_the_reference_measures_nothing_and_says_so():
    comparison = compare(rounded(LOSS, 1), LOSS)
    assert comparison.agree
    assert "measures nothing" in format_verdict(comparison)


def test_the_verdict_names_tolerance_and_control():
    text = format_verdict(compare(rounded(LOSS, 1), rounded(LOSS, 2)))
    for words in ("first 20 steps, 1e-04 allowed", "3e-02 allowed", "the control (control, up to"):
        assert words in text
    assert text.count(". ") == 0


# Runs that do not fit together


def test_a_shorter_run_differs_unless_common_steps_are_asked_for():
    comparison = compare(LOSS[:150])
    assert broken(comparison) == {"steps"}
    assert "llep has 150 (1-150)" in format_verdict(comparison)
    assert compare(LOSS[:150], only_common=True).agree
    assert "150 steps are common" in format_verdict(compare(LOSS[:150], only_common=True))
    assert not compare(LOSS[:150] * 1.005, only_common=True).agree


def test_runs_logged_at_other_steps_are_refused():
    even = make_curve(LOSS[:100])
    even = replace(even, steps=even.steps + 1000)
    other = replace(make_log("llep"), curves={"lm loss": even})
    with pytest.raises(ValueError, match=r"plain has steps 1-200, llep 1001-1100: none is common"):
        compare_runs(PLAIN, other, [Metric(name="lm loss")])


def test_common_steps_of_different_intervals_are_compared_by_step():
    every_second = replace(make_curve(LOSS[1::2]), steps=np.arange(2, STEPS + 1, 2))
    other = replace(make_log("llep"), curves={"lm loss": every_second})
    comparison = compare_runs(PLAIN, other, [Metric(name="lm loss")], only_common=True)
    assert comparison.agree
    assert comparison.judgements[0].apart.max() == 0


@pytest.mark.parametrize(
    ("control", "message"),
    [
        (rounded(LOSS, 1)[:50], "the control has 50 of the 200 steps"),
        (np.where(np.arange(STEPS) == 3, np.nan, LOSS), "not finite"),
    ],
)
def test_an_unusable_control_is_refused(control, message):
    with pytest.raises(ValueError, match=message):
        compare(rounded(LOSS, 2), control)


def test_several_metrics_must_all_agree():
    accuracy = np.linspace(0, 0.9, 8)
    noisy = Tolerance(absolute=True, early=0.05, early_steps=0, overall=0.05)
    metrics = [Metric(name="lm loss"), Metric(name="accuracy", tolerance=noisy)]
    sides = [
        make_log(name, lm_loss=LOSS, accuracy=accuracy + shift)
        for name, shift in (("plain", 0), ("llep", 0.04), ("worse", -0.1))
    ]
    assert compare_runs(sides[0], sides[1], metrics).agree
    verdict = format_verdict(compare_runs(sides[0], sides[2], metrics))
    assert "DIFFER: accuracy at most 1.0e-01 apart (absolute)" in verdict
    assert "lm loss" not in verdict


@pytest.mark.parametrize(
    "fields", [{"early": 0}, {"overall": -1}, {"factor": 0.5}, {"early_steps": -1}]
)
def test_tolerances_that_allow_nothing_are_refused(fields):
    with pytest.raises(ValueError, match="give"):
        Tolerance(**fields)


def test_something_must_be_judged():
    with pytest.raises(ValueError, match="nothing to judge"):
        compare_runs(PLAIN, PLAIN, [Metric(name="lm loss", tolerance=None)])
