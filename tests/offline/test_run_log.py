"""Sessions and phases of a run: which values count, and what the clock counts."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from run_logs import make_log

from megatron_llep.offline.compare.run_log import Session, join_sessions


def make_session(first, last, *, start, folder="a", step_seconds=1.0, values=None, metric="loss"):
    steps = np.arange(first, last + 1)
    values = steps * 10.0 if values is None else values
    times = start + (steps - first) * step_seconds
    return Session(Path(folder), {metric: np.stack([steps, values, times], axis=1)})


def join(*sessions):
    return join_sessions(sessions, "run", "runs/run")


def test_the_clock_starts_with_the_first_step():
    curve = join(make_session(1, 4, start=5000, step_seconds=2)).curve("loss")
    assert curve.steps.tolist() == [1, 2, 3, 4]
    assert curve.seconds.tolist() == [0, 2, 4, 6]


def test_what_is_logged_before_the_first_step_is_at_zero():
    rows = {
        "loss": np.array([[1, 3, 1060.0], [2, 2, 1061]]),
        "accuracy": np.array([[0, 0.1, 1000]]),
    }
    run = join(Session(Path("a"), rows))
    assert run.curve("accuracy").seconds.tolist() == [0]
    assert run.curve("loss").seconds.tolist() == [0, 1]


def test_a_resumed_session_replaces_what_it_repeats():
    crashed = make_session(1, 6, start=100, values=np.full(6, 1.0))
    resumed = make_session(5, 8, start=900, values=np.full(4, 2.0))
    curve = join(resumed, crashed).curve("loss")
    assert curve.steps.tolist() == list(range(1, 9))
    assert curve.values.tolist() == [1, 1, 1, 1, 2, 2, 2, 2]
    # Four steps that count of the first session, then at once the second.
    assert curve.seconds.tolist() == [0, 1, 2, 3, 3, 4, 5, 6]


def test_phases_in_folders_of_their_own_follow_each_other():
    run = join(make_session(4, 6, start=900, folder="b"), make_session(1, 3, start=100))
    assert run.curve("loss").steps.tolist() == [1, 2, 3, 4, 5, 6]
    assert run.seconds == 4


def test_two_runs_below_one_folder_are_not_mixed():
    with pytest.raises(ValueError, match=r"a and b both have step 1 of 'loss'"):
        join(make_session(1, 3, start=100), make_session(1, 3, start=900, folder="b"))


def test_what_megatron_logs_over_samples_is_left_out():
    run = join(
        make_session(1, 3, start=0), make_session(16, 48, start=0, metric="lm loss vs samples")
    )
    assert set(run.curves) == {"loss"}
    assert run.last_step == 3


def test_a_log_without_scalars_is_refused():
    with pytest.raises(ValueError, match="no scalar"):
        join(Session(Path("a"), {}))


def test_a_missing_metric_is_named_with_those_that_exist():
    with pytest.raises(ValueError, match=r"plain .* logged no 'accuracy'; it has: lm loss"):
        make_log("plain", lm_loss=np.ones(3)).curve("accuracy")


def test_layers_are_stacked_by_number():
    curves = {f"load_layer_{layer}": np.full(3, layer) for layer in (10, 2, 0)}
    run = make_log("llep")
    run = type(run)("llep", "x", {k: join_curve(v) for k, v in curves.items()})
    assert run.stacked("load")[:, 0].tolist() == [0, 2, 10]
    assert run.stacked("other") is None


def join_curve(values):
    return make_log("x", loss=values).curve("loss")


@given(
    cuts=st.lists(st.integers(2, 30), max_size=4, unique=True),
    repeats=st.integers(0, 5),
    gap=st.floats(1, 1e6),
)
def test_any_interruptions_leave_the_run_as_it_was(cuts, repeats, gap):
    bounds = [1, *sorted(cuts), 31]
    sessions, start = [], 0.0
    for first, end in pairwise(bounds):
        # Some steps beyond the checkpoint are lost and done again.
        last = min(30, end - 1 + repeats)
        sessions.append(make_session(first, last, start=start))
        start += last - first + gap
    curve = join(*reversed(sessions)).curve("loss")
    assert curve.steps.tolist() == list(range(1, 31))
    assert curve.values.tolist() == [step * 10.0 for step in range(1, 31)]
    assert (np.diff(curve.seconds) >= 0).all()
    assert curve.seconds[-1] == pytest.approx(30 - len(sessions))
