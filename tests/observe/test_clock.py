"""Steps and micro-batches: of Megatron's loop, and of loops that only report."""

import argparse

import pytest
from megatron.training import global_vars

from megatron_llep.observe.clock import StepClock


class Reports:
    def __init__(self):
        self.times = 0

    def __call__(self):
        return self.times


@pytest.fixture
def args():
    found = argparse.Namespace(curr_iteration=7)
    global_vars.set_args(found)
    yield found
    global_vars.unset_global_variables()


def test_micro_batches_are_each_layers_own():
    clock = StepClock(Reports())
    assert [clock.tick(layer) for layer in (0, 1, 0, 0, 1)] == [
        (0, 0), (0, 0), (0, 1), (0, 2), (0, 1)
    ]  # fmt: skip


def test_the_iteration_of_the_loop_and_not_its_reports(args):
    reports = Reports()
    clock = StepClock(reports, first_step=3)
    assert clock.tick(0) == (7, 0)
    reports.times += 1
    assert clock.tick(0) == (7, 1)
    args.curr_iteration = 9
    assert clock.tick(0) == (9, 0)


def test_arguments_without_an_iteration_are_another_loops(args):
    del args.curr_iteration
    assert StepClock(Reports(), first_step=3).tick(0) == (3, 0)


def test_reports_without_a_forward_between_them_are_one():
    reports = Reports()
    clock = StepClock(reports, first_step=3)
    reports.times += 2
    assert clock.tick(0) == (3, 0)
    reports.times += 2
    assert clock.tick(1) == (4, 0)
    assert clock.tick(0) == (4, 0)
    reports.times += 1
    assert clock.tick(0) == (5, 0)


def test_another_model_in_the_same_process(args):
    clock = StepClock(Reports())
    assert clock.tick(0) == (7, 0)
    clock.restart()
    assert clock.tick(0) == (7, 0)
    del args.curr_iteration
    clock = StepClock(Reports())
    assert clock.tick(0) == (0, 0)
    clock.restart()
    clock.restart()
    assert clock.tick(0) == (1, 0)
