"""Real Megatron, trained plain, with LLEP, in another order of sums, and with faults planted.

Letters: b = micro-batch size, s = sequence length.
"""

from dataclasses import replace

import pytest
import torch
from run_logs import make_log

from megatron_llep.offline.compare.comparison import Metric, compare_runs
from support.layout import Layout
from support.llep import EAGER, train_with_llep
from support.ranks import run_ranks
from support.training import VOCABULARY, Run, train

STEPS = 30
SAMPLES = 8
LR = 2e-3


def make_progressions(run, step, micro_batch):
    """Progressions [b, s + 1], which can be learnt; a step's samples do not depend on b."""
    generator = torch.Generator().manual_seed(1 + step)
    starts, strides = (torch.randint(VOCABULARY, (SAMPLES, 1), generator=generator) for _ in "ab")
    rows = (starts + (1 + strides % 4) * torch.arange(run.sequence_length + 1)) % VOCABULARY
    first = micro_batch * run.micro_batch_size
    return rows[first : first + run.micro_batch_size]


def make_other_progressions(run, step, micro_batch):
    return make_progressions(run, step + 1000, micro_batch)


def drop_gradients(chunks):
    """One expert's second linear never learns."""
    chunks[0].decoder.layers[1].mlp.experts.local_experts[0].linear_fc2.weight.requires_grad_(False)


@pytest.fixture(scope="module")
def logs():
    run = Run(
        layout=Layout(ep=2),
        steps=STEPS,
        micro_batches=SAMPLES // 2,
        tokens=make_progressions,
        optimizer={"optimizer": "adam", "lr": LR},
    )
    variants = {
        "plain": run,
        "control": replace(run, micro_batch_size=1, micro_batches=SAMPLES),
        "faster": replace(run, optimizer={"optimizer": "adam", "lr": 1.01 * LR}),
        "frozen": replace(run, prepare=drop_gradients),
        "other data": replace(run, tokens=make_other_progressions),
    }

    def work(rank, size):
        losses = {name: train(variant).losses for name, variant in variants.items()}
        return losses | {"llep": train_with_llep(run, EAGER, "model").losses}

    losses = run_ranks(work, 2, timeout=200)[0]
    return {name: make_log(name, lm_loss=torch.tensor(v).numpy()) for name, v in losses.items()}


def compare(logs, name, *, control):
    return compare_runs(
        logs["plain"],
        logs[name],
        [Metric(name="lm loss")],
        control=logs["control"] if control else None,
    )


@pytest.mark.timeout(260)
@pytest.mark.parametrize("control", [False, True])
def test_llep_agrees(logs, control):
    assert compare(logs, "llep", control=control).agree


def test_the_control_is_apart_by_rounding(logs):
    (found,) = compare(logs, "control", control=False).judgements
    assert 0 < found.apart.max() < 1e-5


@pytest.mark.parametrize("control", [False, True])
@pytest.mark.parametrize("fault", ["faster", "frozen", "other data"])
def test_faults_are_found(logs, fault, control):
    assert not compare(logs, fault, control=control).agree
