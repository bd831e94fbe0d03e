"""`python -m megatron_llep tune`: from a recording to a verdict, and to flags that start."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from tune_runs import H200, SHAPE, record

from megatron_llep.config import LLEPConfig
from megatron_llep.offline.check.parse import FlagReader
from megatron_llep.offline.cli import main
from megatron_llep.offline.launch.flags import format_flags, load_config
from megatron_llep.offline.nodes import find_nodes
from megatron_llep.offline.simulator.models import get_model
from megatron_llep.offline.tune import read_sample
from megatron_llep.offline.tune.model import find_shape, predict_others
from megatron_llep.offline.tune.settings import keep_settings, list_flags, list_nodes, make_grid
from megatron_llep.planner import make_plan
from megatron_llep.planner.cost.model import LayerCost
from megatron_llep.planner.topology import ONE_NODE

ROOT = Path(__file__).resolve().parents[3]
TINY = ROOT / "configs" / "tiny.yaml"


def run(capsys, *argv):
    status = main(["tune", *map(str, argv)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def read_row(out, name):
    """The gain and the quartiles of a row of the table."""
    (line,) = [line for line in out.splitlines() if line.startswith(name + "  ")]
    gain, *quartiles = line.split()[-8:-4]
    return float(gain), [float(each) for each in quartiles]


def test_balanced_routing_is_left_alone(tmp_path, capsys):
    record(tmp_path / "run", ["balanced"])
    status, out, _ = run(capsys, tmp_path / "run", "--output", tmp_path / "flags.yaml")
    assert status == 0
    assert "leave it off" in out
    assert "assumption" in out
    assert read_row(out, "best")[0] == 1
    written = yaml.safe_load((tmp_path / "flags.yaml").read_text())
    assert written == {"LLEP_ARGS": {"--moe-llep": False}}


def test_what_is_left_off_starts_plain(tmp_path, capsys):
    record(tmp_path / "run", ["balanced"], experts=8, steps=1)
    path = tmp_path / "flags.yaml"
    assert run(capsys, tmp_path / "run", "--model", TINY, "--output", path)[0] == 0
    sections = load_config(path)
    assert sections["MODEL_ARGS"] == load_config(TINY)["MODEL_ARGS"]
    assert "--moe-llep" not in format_flags(sections["LLEP_ARGS"])


def test_hot_routing_is_switched_on_with_the_gain_that_is_computed_directly(tmp_path, capsys):
    workloads = ["hot-80-4", "zipf"]
    counts = record(tmp_path / "run", workloads, layers=4, steps=3, ranks_per_host=4)
    out_file = tmp_path / "flags.yaml"
    status, out, _ = run(capsys, tmp_path / "run", "--machine", "h200", "--output", out_file)
    assert status == 0
    assert "switch on" in out
    assert "assumption" not in out
    assert "MoE layers only" in out
    assert "3 of 3 micro-batches" in out
    flags = yaml.safe_load(out_file.read_text())["LLEP_ARGS"]
    setting = read_setting(flags)
    times = {"plain": [], "best": []}
    for each in counts:
        options = {
            "planner": setting.planner,
            "tolerance": setting.tolerance,
            "imbalance_threshold": setting.imbalance_threshold,
            "max_foreign": setting.max_foreign_experts,
            "cost": LayerCost(model=H200, shape=SHAPE),
        }
        for name, asked in (("plain", {"planner": "exact", "max_foreign": 0}), ("best", options)):
            plan = make_plan(each, **asked)
            times[name].append(H200.predict_layer(plan, each, SHAPE, ONE_NODE).total)
    plain, best = (np.array(times[name]).reshape(3, 4).sum(axis=1) for name in ("plain", "best"))
    gain, quartiles = read_row(out, "best")
    assert gain == pytest.approx(plain.sum() / best.sum(), abs=1e-3)
    assert quartiles == pytest.approx(np.quantile(plain / best, (0.25, 0.5, 0.75)), abs=1e-3)


def test_the_rest_of_the_model_thins_the_gain(tmp_path, capsys):
    (counts, *_) = record(tmp_path / "run", ["hot-80-4"], experts=8, steps=2)
    _, alone, _ = run(capsys, tmp_path / "run")
    large = tmp_path / "large.yaml"  # with a rest that takes as long as the experts
    args = {"--padded-vocab-size": 10_000_000}
    large.write_text(yaml.safe_dump({"BASE": str(TINY), "MODEL_ARGS": args}))
    _, whole, _ = run(capsys, tmp_path / "run", "--model", large)
    assert "the whole step" in whole
    # Two of its four MoE layers were recorded, so half of the rest counts.
    shape = replace(SHAPE, num_experts=8)
    plan = make_plan(counts, planner="exact", max_foreign=0)
    plain = 2 * H200.predict_layer(plan, counts, shape, ONE_NODE).total
    model = get_model(str(large))
    assert model.moe_layers == 4
    rest = 8192 * model.other_flops_per_token / 2 * 3 / H200.flops_per_second
    expected = (plain + rest) / (plain / read_row(alone, "best")[0] + rest)
    assert read_row(whole, "best")[0] == pytest.approx(expected, abs=2e-3)
    assert 1.05 < expected < read_row(alone, "best")[0] - 0.05


def test_a_layer_of_unknown_size_asks_for_the_model(tmp_path, capsys):
    record(tmp_path / "run", ["hot-80-4"], experts=8, model={}, steps=1)
    status, _, error = run(capsys, tmp_path / "run")
    assert status == 2
    assert "--model" in error
    assert run(capsys, tmp_path / "run", "--model", TINY)[0] == 0


def test_the_sample_is_bounded_and_named(tmp_path, capsys):
    record(tmp_path / "run", ["hot-80-4"], steps=9)
    _, out, _ = run(capsys, tmp_path / "run", "--steps", 4)
    assert "4 of 9 micro-batches" in out
    assert "8 layers" in out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--margin", "1.5"], "--margin"),
        (["--max-foreign", "0"], "--max-foreign"),
        (["--ranks-per-node", "3"], "--ranks-per-node 3"),
        (["--model", "gpt-oss-120b"], "experts"),
        (["--machine", "nowhere.json"], "calibrate"),
    ],
)
def test_bad_flags_name_the_way_out(tmp_path, capsys, flags, words):
    record(tmp_path / "run", ["hot-80-4"], steps=1)
    status, _, error = run(capsys, tmp_path / "run", *flags)
    assert status == 2
    assert words in error


def read_setting(flags, reader=None):
    """What training would make of them."""
    from megatron_llep.integration.arguments import llep_config_from_args

    parsed = (reader or FlagReader()).read(flags)
    assert not parsed.unknown
    assert not parsed.unreadable
    assert not parsed.open
    return llep_config_from_args(parsed.args)


@pytest.mark.parametrize("found", [None, 2])
def test_every_setting_comes_back_from_its_flags(found):
    reader = FlagReader()
    grid = make_grid(
        LLEPConfig(foreign_weights="refetch", scatter_from=2),
        experts_per_rank=4,
        mean_load=1e5,
        machine="h200",
        nodes=list_nodes(find_nodes(2, 4), found),
    )
    for setting in grid[:: len(grid) // 20]:
        assert read_setting(yaml.safe_load(yaml.safe_dump(list_flags(setting))), reader) == setting


def write_for_tiny(tmp_path, capsys):
    record(tmp_path / "run", ["hot-80-4"], experts=8)
    path = tmp_path / "out" / "flags.yaml"
    status, out, _ = run(capsys, tmp_path / "run", "--model", TINY, "--margin", 0, "--output", path)
    assert status == 0
    assert "switch on" in out
    return path


def test_the_file_replaces_the_settings_of_its_base(tmp_path, capsys):
    path = write_for_tiny(tmp_path, capsys)
    sections = load_config(path)
    assert sections["MODEL_ARGS"] == load_config(TINY)["MODEL_ARGS"]
    assert load_config(TINY)["LLEP_ARGS"]["--moe-llep-planner"] == "exact"
    written = yaml.safe_load(path.read_text())["LLEP_ARGS"]
    assert sections["LLEP_ARGS"] == written
    assert written.keys() >= load_config(TINY)["LLEP_ARGS"].keys()
    setting = read_setting({k: v for part in sections.values() for k, v in part.items()})
    assert setting.enabled
    assert format_flags(written).count("--moe-llep-planner") == 1
    assert main(["check", str(path)]) == 0
    assert "1 of 1 start" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("info", "nodes", "told"),
    [
        ({"ranks_per_host": 2}, "2 nodes of 2 ranks, as recorded", None),
        ({"ranks_per_host": 4}, "1 node, as recorded", None),
        ({}, "1 node, an assumption", None),
        (
            {"ranks_per_host": 4, "settings": {"ranks_per_node": 2}},
            "2 nodes of 2 ranks, as recorded",
            2,
        ),
    ],
)
def test_nodes_that_training_finds_are_not_told(tmp_path, capsys, info, nodes, told):
    """Whatever the base says of them; what is written passes `check`."""
    record(tmp_path / "run", ["hot-80-4"], experts=8, steps=2, **info)
    base = tmp_path / "base.yaml"
    args = {"--moe-llep": True, "--moe-llep-ranks-per-node": 1, "--moe-llep-lend-to": "own_node"}
    base.write_text(yaml.safe_dump({"BASE": str(TINY), "LLEP_ARGS": args}))
    path = tmp_path / "flags.yaml"
    _, out, _ = run(capsys, tmp_path / "run", "--model", base, "--margin", 0, "--output", path)
    assert f"nodes: {nodes}" in out
    assert "switch on" in out
    flags = format_flags(load_config(path)["LLEP_ARGS"])
    assert ("--moe-llep-ranks-per-node" in flags) == (told is not None)
    assert read_setting(yaml.safe_load(path.read_text())["LLEP_ARGS"]).ranks_per_node == told
    assert main(["check", str(path)]) == 0
    assert "1 of 1 start" in capsys.readouterr().out


@pytest.mark.slow
def test_the_file_starts_a_training(tmp_path, capsys):
    path = write_for_tiny(tmp_path, capsys)
    done = subprocess.run(
        [
            *(sys.executable, ROOT / "tools" / "launch.py", path, "--"),
            *("--mock-data", "--train-iters", "3", "--num-layers", "2"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=500,  # half a minute where nothing else runs
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert "iteration        3/       3" in done.stdout
    planner = yaml.safe_load(path.read_text())["LLEP_ARGS"]["--moe-llep-planner"]
    assert re.search(rf"moe_llep_planner \.+ {planner}$", done.stdout, re.MULTILINE)


def test_what_the_run_says_of_itself_goes_before_the_file(tmp_path):
    shape = {"hidden": 64, "ffn_hidden": 32, "bytes_per_element": 4, "refetch": True}
    model = shape | {"other_flops_per_token": 1e6}
    settings = {"planner": "lla", "token_assignment": "rank_order", "record": "somewhere"}
    record(tmp_path, ["zipf"], experts=8, model=model, settings=settings, layers=2, steps=2)
    sample = read_sample(tmp_path, 1)
    base = keep_settings(sample.settings)
    assert base == LLEPConfig(token_assignment="rank_order")
    tiny = get_model(str(TINY))
    found = find_shape(sample, base, tiny)
    assert {name: getattr(found, name) for name in shape} == shape
    assert (found.num_experts, found.top_k) == (8, 2)
    # Both of its layers in a micro-batch: the whole rest.
    (others,) = predict_others(sample, tiny, H200)
    assert others == pytest.approx(8192 * 1e6 * 3 / H200.flops_per_second)
