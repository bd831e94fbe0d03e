"""Many runs in one process group, each plain and with LLEP, which must agree."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby

import torch
import torch.distributed as dist

from megatron_llep.config import LLEPConfig
from support.layout import use_layout
from support.llep import EAGER, Loans, assert_same_run, train_with_llep
from support.ranks import run_ranks
from support.training import Run, TrainResult, train


@dataclass(frozen=True)
class Case:
    """One run, and how close LLEP must come to plain Megatron."""

    run: Run
    llep: LLEPConfig = EAGER
    loss_tolerance: float = 1e-5
    gradient_tolerance: float = 1e-4
    exact: Run | None = None
    """The same run in more precision, as a control of what rounding does to plain Megatron."""
    everywhere: bool = True
    """Whether every stage of the pipeline has experts to lend; one of them has, at least."""


def compare_one(case: Case) -> tuple[TrainResult, Loans]:
    """Train on this rank's world, plain and with LLEP; the plain result and what was lent.

    Raises:
        AssertionError: the two differ, or nothing was lent though there are ranks to lend to.
    """
    plain = train(case.run)
    lending = train_with_llep(case.run, case.llep)
    assert_same_run(
        lending,
        plain,
        loss_tolerance=case.loss_tolerance,
        gradient_tolerance=case.gradient_tolerance,
        exact=train(case.exact) if case.exact is not None else None,
    )
    lent = lending.observed.transfers
    if not case.everywhere:
        assert (lent > 0) == (lending.observed.plans > 0), "was anything lent in this stage?"
        lent = torch.tensor(lent)
        dist.all_reduce(lent)
    assert (lent > 0) == (case.run.layout.ep > 1), "was anything lent?"
    return plain, lending.observed


def compare_all(cases: Mapping[str, Case], *, timeout: float = 240) -> None:
    """Compare every case in one process group; all have the same world size.

    Cases of one layout share its groups if they follow each other.

    Raises:
        AssertionError: the traceback of a rank, which ends with the name of the case.
    """
    (world_size,) = {case.run.layout.world_size for case in cases.values()}

    def work(rank: int, size: int) -> None:
        for layout, group in groupby(cases, key=lambda name: cases[name].run.layout):
            with use_layout(layout):
                for name in group:
                    try:
                        compare_one(cases[name])
                    except BaseException as error:
                        error.add_note(f"case: {name}")
                        raise

    run_ranks(work, world_size, timeout=timeout)
