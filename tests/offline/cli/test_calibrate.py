"""calibrate: a trial run on this machine, and its flags."""

from types import SimpleNamespace

import pytest

from megatron_llep.offline.calibration import measure
from megatron_llep.offline.calibration.fit import ExpertTiming
from megatron_llep.offline.cli import calibrate, main
from megatron_llep.planner.cost.model import CostModel
from megatron_llep.planner.cost.presets import PRESETS


def test_a_trial_run(tmp_path, capsys):
    path = tmp_path / "cost.json"
    assert main(["calibrate", "--quick", "--output", str(path), "--inter-node-bandwidth", "3"]) == 0
    out = capsys.readouterr().out
    assert "prediction error, forward and backward of an expert: " in out
    assert "prediction error, transfers: " in out
    assert "prediction error, uneven exchanges: " in out
    assert f"written to {path}" in out
    model = CostModel.load(path)
    assert 1e8 < model.flops_per_second < 1e13
    assert 1e6 < model.intra_node.bytes_per_second < 1e12
    assert model.inter_node.bytes_per_second == 3e9
    assert model.inter_node.latency_seconds == pytest.approx(20e-6)
    assert "torch" in model.machine
    assert 0 <= model.overlap <= 1


def test_links_from_a_data_sheet(tmp_path, monkeypatch):
    timings = [
        ExpertTiming(tokens=n, flops_per_token=f, forward_seconds=n * f, backward_seconds=n * f)
        for f in (1, 2)
        for n in (1, 2, 4, 8)
    ]
    found = measure.Measurements(
        experts=timings, copy_bytes_per_second=1.0, inside=None, across=None, overlap=0.0
    )
    monkeypatch.setattr(measure, "measure", lambda sizes, report, ranks: found)
    path = tmp_path / "cost.json"
    assert main(["calibrate", "--links", "h100", "--output", str(path)]) == 0
    model = CostModel.load(path)
    assert model.intra_node == PRESETS["h100"].intra_node
    assert model.inter_node == PRESETS["h100"].inter_node
    assert model.overlap == PRESETS["h100"].overlap
    assert PRESETS["h100"].machine in model.machine
    assert str(round(model.planning_seconds * 1e6)) in calibrate.describe_model(model)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--hidden", "8"], "--ffn-hidden"),
        (["--links", "abacus"], "h100, h200"),
        (["--ranks", "1"], "--ranks 1"),
        (["--ranks-per-node", "2"], "--ranks-per-node 2: here is one node"),
    ],
)
def test_flags_that_make_no_sense(flags, message, capsys):
    assert main(["calibrate", *flags]) == 2
    assert message in capsys.readouterr().err


def test_one_gpu_has_nobody_to_talk_to(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    args = SimpleNamespace(
        hidden=None, ffn_hidden=None, links=None, ranks=None, ranks_per_node=None, quick=True
    )
    with pytest.raises(ValueError, match="--links"):
        calibrate.calibrate(args)


def test_sizes_for_one_expert():
    sizes = measure.choose_sizes(measure.CPU_SIZES, expert=(64, 32), quick=False)
    assert sizes.experts == ((64, 32),)
    assert sizes.tokens == measure.CPU_SIZES.tokens
    assert measure.choose_sizes(sizes, expert=None, quick=True).repeats < sizes.repeats
