"""make chaos: draws follow from seed and number; faults and hangs are found; results add up."""

import contextlib
import json
import os
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from chaos_draws.compare import RankReport, find_disagreements
from chaos_draws.crew import Crew, Outcome
from chaos_draws.draw import LAYOUTS, make_draw
from chaos_draws.record import append_run, describe_block
from chaos_draws.session import run_draws
from megatron_llep.lending.loan import WeightLoan
from support.layout import Layout

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import run_chaos  # noqa: E402

DRAWS = [make_draw(0, number) for number in range(400)]
LIMIT = 6.0  # what a draw of two ranks takes here many times over, on a busy machine too
OF_TWO = [draw for draw in DRAWS if draw.layout == Layout(ep=2)]


def test_a_draw_follows_from_seed_and_number():
    assert [make_draw(0, number) for number in range(400)] == DRAWS
    assert len({repr(replace(draw, number=0)) for draw in DRAWS}) == len(DRAWS)
    assert repr(replace(make_draw(1, 0), seed=0)) != repr(DRAWS[0])


def test_draws_are_of_all_kinds():
    layouts = Counter(draw.layout for draw in DRAWS)
    assert set(layouts) == set(LAYOUTS)
    assert min(layouts.values()) > 10
    llep = [draw.llep for draw in DRAWS]
    assert {each.planner for each in llep} == {"tolerant", "exact", "lla", "lp"}
    for field in ("replicas", "token_assignment", "foreign_weights", "grad_dtype", "lend_to"):
        assert len({getattr(each, field) for each in llep}) > 1, field
    assert any(each.replicas == "expert-dp" and each.planner == "tolerant" for each in llep)
    assert {draw.dtype for draw in DRAWS} == {"float32", "float64", "bfloat16"}
    assert {len(step) for draw in DRAWS for step in draw.tokens} == {1, 2}
    assert any("recompute_modules" in draw.model for draw in DRAWS)
    for draw in DRAWS:
        for step in draw.tokens:
            for counts in step:
                assert len(counts) == draw.layout.world_size
                assert max(counts) > 0
    assert any(0 in counts for draw in DRAWS for step in draw.tokens for counts in step)


@contextlib.contextmanager
def return_nothing(draw, rank):
    """Gradients of lent experts come home and are not added."""
    finish = WeightLoan.finish_return

    def forget(loan):
        list(finish(loan))
        return iter(())

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(WeightLoan, "finish_return", forget)
        yield


def test_a_lost_gradient_is_found_in_every_draw_that_lends():
    found = []
    with Crew(2, limit=30, disturb=return_nothing) as crew:
        for draw in OF_TWO[:4]:
            outcome = crew.run(draw)
            found.append(outcome.lent > 0)
            assert outcome.verdict == ("differs" if outcome.lent else "same"), outcome
            assert all(".experts." in each for each in outcome.details)
    assert set(found) == {True, False}


def test_a_hang_is_told_with_where_each_rank_waits():
    stuck = OF_TWO[0]

    def wait_for_ever():
        time.sleep(100)

    @contextlib.contextmanager
    def hang(draw, rank):
        if draw.number == stuck.number and rank == 1:
            wait_for_ever()
        yield

    with Crew(2, limit=LIMIT, disturb=hang) as crew:
        hanging, same = (crew.run(draw) for draw in OF_TWO[:2])
    assert (hanging.verdict, same.verdict) == ("hangs", "same")
    waiting, sleeping = hanging.details
    assert waiting.startswith("rank 0 is in torch/distributed/")
    assert "megatron_llep/validation.py" in waiting
    assert sleeping.startswith("rank 1 is in test_chaos_draws.py")
    assert "wait_for_ever" in sleeping
    assert LIMIT < hanging.seconds < 2 * LIMIT


def test_a_rank_that_raises_or_dies_fails_its_draw_alone():
    @contextlib.contextmanager
    def fail(draw, rank):
        if rank == 1 and draw.number == OF_TWO[0].number:
            raise KeyError("the cause")
        if rank == 1 and draw.number == OF_TWO[1].number:
            os._exit(3)
        yield

    with Crew(2, limit=30, disturb=fail) as crew:
        raised, died, same = (crew.run(draw) for draw in OF_TWO[:3])
    assert raised.verdict == died.verdict == "failed"
    assert any("KeyError: 'the cause'" in each for each in raised.details)
    assert any(each.startswith("rank 1 died") for each in died.details)
    assert max(raised.seconds, died.seconds) < 20
    assert same.verdict == "same"


def test_ranks_that_are_unlike_are_told():
    def report(rank, **changes):
        settings = {"plans": [7], "calls": 1, "reduced": [([0, 1], 3), ([rank], rank)]} | changes
        return RankReport(differs=[], lent=0, sharers=[0, 1], exchanges=0, **settings)

    def tell(**changes):
        return find_disagreements([report(0), report(1, **changes)])

    assert tell() == []
    assert tell(plans=[8]) == ["ranks 0 and 1 have unlike plans"]
    assert tell(calls=2) == ["ranks 0 and 1 have unlike calls"]
    assert tell(reduced=[([0, 1], 4), ([1], 1)]) == [
        "ranks 0 and 1 have unlike reduced gradients of dense weights"
    ]
    assert find_disagreements([replace(report(0), lent=1), report(1)]) == [
        "rank 0 sent nothing, though experts are lent"
    ]


def test_layouts_follow_each_other():
    with_tp = Layout(tp=2, ep=2, etp=1)
    first = next(n for n, draw in enumerate(DRAWS) if draw.layout == with_tp)
    second = next(draw.number for draw in OF_TWO if draw.number > first)
    numbers = range(first, second + 1, second - first)
    outcomes = list(run_draws(0, numbers, limit=30))
    assert [outcome.draw.number for outcome in outcomes] == [second, first]
    assert {outcome.verdict for outcome in outcomes} == {"same"}


def test_results_are_added_to_a_file_that_keeps_count(tmp_path, capsys):
    results = tmp_path / "chaos.json"
    small = OF_TWO[0].number

    def run(first, draws):
        arguments = ["--draws", draws, "--seed", 0, "--first", first, "--results", results]
        assert run_chaos.main([str(each) for each in arguments]) == 0
        return json.loads(results.read_text())

    first = run(small, 1)
    assert first["totals"]["draws"] == 1
    entry = first["runs"][0]
    assert (entry["seed"], entry["first"], entry["draws"], entry["failed"]) == (0, small, 1, 0)
    assert entry["layouts"] == {"ep2": 1}
    assert f"seed 0, draws {small} to {small}: 0 failed" in capsys.readouterr().out
    again = run(small, 1)
    assert again["runs"][0] == entry
    # One number of one seed, run twice.
    assert (again["totals"]["draws"], again["totals"]["runs_of_draws"]) == (1, 2)


def test_an_entry_that_goes_on_becomes_part_of_the_last(tmp_path):
    def append(first, commit="abc"):
        outcomes = [
            Outcome(draw=make_draw(0, number), verdict="same", lent=number % 2, seconds=1.0)
            for number in range(first, first + 10)
        ]
        block = range(first, first + 10)
        entry = describe_block(0, block, outcomes, seconds=5.0, commit=commit)
        append_run(tmp_path / "results.json", entry)
        return json.loads((tmp_path / "results.json").read_text())

    append(0)
    found = append(10)
    (whole,) = found["runs"]
    counts = {name: whole[name] for name in ("first", "draws", "failed", "lent", "seconds")}
    assert counts == {"first": 0, "draws": 20, "failed": 0, "lent": 10, "seconds": 10.0}
    assert whole["layouts"] == Counter(str(draw.layout) for draw in DRAWS[:20])
    assert [run["draws"] for run in append(30)["runs"]] == [20, 10]
    found = append(40, commit="def")
    assert [run["draws"] for run in found["runs"]] == [20, 10, 10]
    assert found["totals"]["draws"] == 40


def test_a_failure_is_told_and_recorded_with_what_repeats_it(capsys):
    number = next(
        draw.number
        for draw in OF_TWO
        if draw.llep.planner == "exact" and draw.llep.max_foreign_experts is None and draw.skew > 1
    )
    block = range(number, number + 1)
    entry = run_chaos.run_block(0, block, 30, "commit", lambda: None, disturb=return_nothing)
    command = f"make chaos DRAWS=1 SEED=0 FIRST={number}"
    assert (entry["draws"], entry["failed"], entry["commit"]) == (1, 1, "commit")
    (failure,) = entry["failures"]
    assert (failure["repeat"], failure["verdict"]) == (command, "differs")
    assert ".experts." in failure["details"][0]
    assert command in capsys.readouterr().out
