"""What tools/gpu_check.py demands of the critical path and of memory, and how it shows them."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

import gpu_check
from gpu_checks import critical_path, demands
from gpu_checks.demands import Row
from gpu_checks.section import SkippedError


def make_row(workload, method, seconds, mib=1000, **changes):
    fields = {
        "model": "deepseek-v3",
        "experts": "grouped_mm",
        "workload": workload,
        "method": method,
        "rank": 0,
        "imbalance": 1.0,
        "lent": 0,
        "forward_seconds": seconds / 3,
        "layer_seconds": seconds,
        "idle_seconds": None,
        "host_seconds": 0.001,
        "exchange_seconds": 0.0,
        "lending_seconds": 0.0,
        "returning_seconds": 0.0,
        "peak_bytes": mib * 2**20,
    }
    return Row(**{**fields, **changes})


# The hot one takes 7.6 s in all.
BASE = [
    make_row("balanced", "plain", 1.0),
    make_row("hot-95-1", "plain", 6.6, mib=5000, exchange_seconds=1.0),
]


@pytest.mark.parametrize(
    ("row", "slow"),
    [
        (make_row("hot-95-1", "tolerant", 7.6 / 5.2), False),
        (make_row("hot-95-1", "tolerant", 7.6 / 5.0), True),
        (make_row("hot-95-1", "tolerant", 7.6 / 5.2, returning_seconds=0.1), True),
        (make_row("hot-95-1", "lla", 7.6 / 5.0), False),  # held to it is the default planner
        (make_row("balanced", "lla", 1.019), False),
        (make_row("balanced", "lla", 1.0, exchange_seconds=0.021), True),
    ],
)
def test_what_is_too_slow(row, slow):
    assert bool(demands.find_slow([*BASE, row])) == slow


def test_what_is_too_heavy():
    rows = [
        *BASE,
        make_row("hot-95-1", "exact", 1.0, mib=1101),
        make_row("hot-80-1", "exact", 1.0, mib=1099),
    ]
    (short,) = demands.find_heavy(rows)
    assert "hot-95-1, exact: 1.10 of balanced" in short


def test_the_tables_show_the_paper_beside_what_was_found():
    rows = [*BASE, make_row("hot-95-1", "tolerant", 1.9, lending_seconds=0.1)]
    line = demands.format_time_table(rows).splitlines()[-1].split()
    assert line[3] == "tolerant"
    assert line[5:8] == ["1900.00", "-", "1.00"], "layer, idle, host"
    speedup, forward, layer, paper = map(float, line[-4:])
    assert speedup == pytest.approx(7.6 / 2.0, abs=0.01)
    assert forward == pytest.approx((6.6 / 3 + 0.5) / (1.9 / 3 + 0.1), abs=0.01)
    assert layer == pytest.approx(6.6 / 1.9, abs=0.01)
    assert paper == 5.1
    assert "5.00" in demands.format_memory_table(rows).splitlines()[2]


def test_where_plain_does_not_fit_nothing_is_compared():
    lonely = make_row("hot-80-1", "tolerant", 1.0)
    assert not demands.find_slow([*BASE, lonely])
    assert "hot-80-1" not in demands.format_time_table([*BASE, lonely])


def make_job(judged):
    options = ["--device", "cpu", "--quick"]
    job = gpu_check.make_path_job(gpu_check.build_parser().parse_args(options))
    assert not job.judged
    return replace(job, judged=judged)


def test_demands_decide_only_where_they_apply(capsys):
    rows = [*BASE, make_row("hot-95-1", "tolerant", 7.0, mib=4000)]
    assert critical_path.judge_time(make_job(True), rows, []).state == "FAILED"
    assert critical_path.judge_memory(make_job(True), rows).state == "FAILED"
    assert critical_path.judge_time(make_job(False), rows, []).state == "not judged"
    good = [*BASE, make_row("hot-95-1", "tolerant", 1.0)]
    assert critical_path.judge_time(make_job(True), good, []).state == "passed"
    assert critical_path.judge_time(make_job(True), good, ["te: too large"]).state == "FAILED"
    assert critical_path.judge_memory(make_job(True), good).state == "passed"
    unknown = [replace(row, peak_bytes=None) for row in rows]
    with pytest.raises(SkippedError, match="on GPUs only"):
        critical_path.judge_memory(make_job(True), unknown)
    assert "stand-in" in capsys.readouterr().out
