"""`--moe-llep-record` in Megatron's own loop, and what the commands make of it."""

import numpy as np
import pytest
from script_runs import run_tiny

from megatron_llep.offline.cli import main
from megatron_llep.offline.recording import Recording
from megatron_llep.planner import load_per_rank

STEPS, HALF, LAYERS, MICRO_BATCHES = 4, 2, 2, 2

pytestmark = pytest.mark.timeout(600)


def run(folder, *flags):
    common = ["--mock-data", "--train-iters", STEPS, "--eval-interval", HALF, "--eval-iters", 1]
    return run_tiny([*common, "--moe-llep-record", folder, *flags], llep=True)


def read_counts(folder):
    return {
        (row.step, row.micro_batch, row.layer): row.counts for row in Recording.open(folder).read()
    }


def test_each_iteration_is_a_step(tmp_path, capsys):
    """Steps are those of the log, whose numbers follow from the counts; evaluation is left out."""
    folder = tmp_path / "recording"
    log = run(folder)
    counts = read_counts(folder)
    assert sorted(counts) == list(np.ndindex(STEPS, MICRO_BATCHES, LAYERS))
    for step in range(STEPS):
        worst = max(
            np.mean([imbalance(counts[step, m, layer]) for m in range(MICRO_BATCHES)])
            for layer in range(LAYERS)
        )
        assert log.read("overload_factor_before")[step + 1] == pytest.approx(worst, abs=0.0051)
    info = Recording.open(folder).info
    assert info.planner == info.settings["planner"] == "exact"
    assert info.model["other_flops_per_token"] > 0
    assert main(["plan", "--trace", str(folder), "--step", "3", "--layer", "1"]) == 0
    assert "(step 1, micro-batch 1, group 0, layer 1)" in capsys.readouterr().out
    assert main(["simulate", "--trace", str(folder), "--methods", "exact"]) == 0
    assert "MoE layers alone" not in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("planner", ["exact", "observe"])
def test_a_run_that_is_resumed_goes_on(tmp_path, planner):
    """From a checkpoint half-way, which is deterministic: the same counts, written once more."""
    folder = tmp_path / "recording"
    flags = ["--moe-llep-planner", planner, "--save", tmp_path / "saved", "--save-interval", HALF]
    flags += ["--ckpt-format", "torch_dist"]
    run(folder, *flags)
    before, pieces = read_counts(folder), len(list(folder.iterdir()))
    assert len(before) == STEPS * MICRO_BATCHES * LAYERS
    run(folder, *flags, "--load", tmp_path / "saved", "--ckpt-step", HALF)
    assert len(list(folder.iterdir())) > pieces
    after = read_counts(folder)
    assert after.keys() == before.keys()
    for place, counts in after.items():
        np.testing.assert_array_equal(counts, before[place])


def imbalance(counts):
    load = load_per_rank(counts, 1, len(counts))
    return load.max() / load.mean()
