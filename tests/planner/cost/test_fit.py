"""Calibration's arithmetic: it finds the numbers that made the timings, and says how far off."""

from dataclasses import replace

import numpy as np
import pytest

from megatron_llep.offline.calibration.build import build_cost_model
from megatron_llep.offline.calibration.fit import (
    ExpertTiming,
    LinkTimings,
    TransferTiming,
    find_errors,
    fit_expert,
    fit_link,
    fit_not_negative,
    predict_transfer,
)
from megatron_llep.planner.cost.link import Link


def time_expert(tokens: int, flops_per_token: int, noise: float = 1.0) -> ExpertTiming:
    """An expert that runs at 1 GFLOP/s, half at 40 tokens, with 1 ms overhead."""
    forward = (flops_per_token * (tokens + 40) / 1e9 + 1e-3) * noise
    return ExpertTiming(
        tokens=tokens,
        flops_per_token=flops_per_token,
        forward_seconds=forward,
        backward_seconds=1.8 * forward,
    )


EXPERTS = [time_expert(n, flops) for flops in (10**5, 10**6) for n in (8, 16, 64, 256, 1024)]


def time_transfer(seconds: float, sent: int, back: int) -> TransferTiming:
    """Of two ranks."""
    return TransferTiming(sent=np.array([[0, sent], [back, 0]]), seconds=seconds)


TRANSFERS = [time_transfer(2e-4 + n / 1e9, n, n) for n in (10**3, 10**5, 10**6)]


def test_the_expert_that_was_timed_is_found():
    fit = fit_expert(EXPERTS)
    assert fit.flops_per_second == pytest.approx(1e9)
    assert fit.half_rate_tokens == pytest.approx(40)
    assert fit.gemm_overhead_seconds == pytest.approx(1e-3)
    assert fit.backward_factor == pytest.approx(1.8)
    new = time_expert(500, 3 * 10**6)
    assert fit.predict(new) == pytest.approx(new.forward_seconds + new.backward_seconds)


def test_the_link_that_was_timed_is_found():
    link = fit_link(TRANSFERS)
    assert link.latency_seconds == pytest.approx(2e-4)
    assert link.bytes_per_second == pytest.approx(1e9)
    assert (link.burst_bytes, link.opposite_cost) == (0, 0)


def test_the_burst_and_the_way_back_are_found():
    made = Link(
        latency_seconds=1e-4,
        bytes_per_second=1e9,
        burst_bytes=4e5,
        burst_cost=0.25,
        opposite_cost=0.6,
    )
    ways = [
        (n * 10**5, round(n * back * 10**5)) for back in (0, 0.5, 1) for n in (1, 2, 4, 8, 16, 32)
    ]
    blank = [time_transfer(1.0, *numbers) for numbers in ways]
    timings = [replace(timing, seconds=predict_transfer(made, timing)) for timing in blank]
    link = fit_link(timings)
    assert link.burst_bytes == made.burst_bytes
    assert link.opposite_cost == made.opposite_cost
    assert link.latency_seconds == pytest.approx(made.latency_seconds)
    assert link.bytes_per_second == pytest.approx(made.bytes_per_second)
    assert link.burst_cost == pytest.approx(made.burst_cost)
    # A size between the timed ones, and another way back.
    new = time_transfer(1.0, 200_000, 600_000)
    by_hand = 1e-4 + (0.25 * 4e5 + 2e5 + 0.6 * 0.25 * 2e5) / 1e9
    assert predict_transfer(link, new) == pytest.approx(by_hand)


def test_no_burst_takes_longer_than_the_rest():
    # Small ones slower than any rate says, as noise makes them.
    sizes = [10**4, 2 * 10**4, 4 * 10**4, 10**5, 10**6, 10**7, 10**8]
    link = fit_link([time_transfer(min(n / 1e8, 1e-3 + n / 1e9), n, n) for n in sizes])
    assert link.burst_cost == 1
    assert link.bytes_per_second > 0


def test_no_number_is_negative():
    # The best straight line would start below zero.
    x = np.array([1.0, 2.0, 3.0])
    columns = np.stack([x, np.ones(3)], axis=1)
    slope, start = fit_not_negative(columns, x - 0.5)
    assert start == 0
    assert slope > 0


def test_timings_that_do_not_grow():
    x = np.array([1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="quieter machine"):
        fit_not_negative(-x[:, None], np.ones(3))


def test_the_check_uses_timings_that_were_held_out():
    # Every other timing is a third too slow: the fit must not know.
    flops = [10**5, 10**6, 10**5, 10**6, 10**5, 10**6]
    timings = []
    for i, (n, f) in enumerate(zip((8, 8, 16, 16, 256, 256), flops, strict=True)):
        timings += [time_expert(n, f), time_expert(n + i, f, noise=1.5)]
    arguments = {
        "machine": "made up",
        "experts": timings,
        "copy_bytes_per_second": 1e9,
        "overlap": 0.5,
        "planning_seconds": 1e-4,
    }
    model, (experts, transfers) = build_cost_model(
        inside=LinkTimings(regular=TRANSFERS), **arguments
    )
    assert model.flops_per_second == pytest.approx(1e9)
    assert experts.points == 6
    assert experts.median == pytest.approx(1 / 3)
    assert transfers.worst == pytest.approx(0, abs=1e-9)
    assert model.inter_node == model.intra_node
    other = Link(latency_seconds=1.0, bytes_per_second=2.0)
    model, checks = build_cost_model(intra_node=other, **arguments)
    assert model.intra_node == model.inter_node == other
    assert len(checks) == 1


def test_each_link_is_fitted_to_its_own_exchanges():
    slow = [time_transfer(1e-3 + n / 1e7, n, n) for n in (10**3, 10**4, 10**5, 10**6, 10**7)]
    arguments = {
        "machine": "made up",
        "experts": EXPERTS,
        "copy_bytes_per_second": 1e9,
        "overlap": 0.5,
        "planning_seconds": 1e-4,
        "across": LinkTimings(regular=slow, uneven=slow[:1]),
    }
    model, checks = build_cost_model(inside=LinkTimings(regular=TRANSFERS), **arguments)
    assert model.intra_node.bytes_per_second == pytest.approx(1e9)
    assert model.inter_node.bytes_per_second == pytest.approx(1e7)
    assert model.inter_node.latency_seconds == pytest.approx(1e-3)
    assert [check.what for check in checks[1:]] == [
        "transfers",
        "transfers between nodes",
        "uneven exchanges between nodes",
    ]
    # With one rank a node there is nothing inside.
    model, checks = build_cost_model(**arguments)
    assert model.intra_node == model.inter_node
    assert model.inter_node.bytes_per_second == pytest.approx(1e7)
    with pytest.raises(ValueError, match="no link"):
        build_cost_model(**arguments | {"across": None})


def test_errors_are_relative():
    median, worst = find_errors([11.0, 1.0, 60.0], [10.0, 1.0, 100.0])
    assert (median, worst) == pytest.approx((0.1, 0.4))


def test_too_few_timings():
    with pytest.raises(ValueError, match="at least 3"):
        fit_expert(EXPERTS[:2])
    with pytest.raises(ValueError, match="at least 2"):
        fit_link(TRANSFERS[:1])
