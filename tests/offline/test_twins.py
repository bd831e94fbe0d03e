"""Plain EP, LLEP and control from one configuration: what their commands share and what not."""

from pathlib import Path

import pytest

from megatron_llep.offline.launch.flags import parse_extra
from megatron_llep.offline.launch.twins import plan_twins

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "configs" / "tiny.yaml"


def plan(*extra, **options):
    options = {"launcher": Path("launch.py"), **options}
    runs = plan_twins(TINY, parse_extra(extra), Path("out"), **options)
    return {run.kind: run.command for run in runs}


def flags_after_split(command):
    return parse_extra(command[command.index("--") + 1 :])


def differing(first, second):
    a, b = flags_after_split(first), flags_after_split(second)
    names = {name for name in a.keys() | b.keys() if a.get(name) != b.get(name)}
    return names - {"--tensorboard-dir"}


def test_plain_and_llep_differ_in_llep_only():
    commands = plan("--moe-llep-planner", "lla", "--lr", "1e-4")
    assert "--no-llep" in commands["plain"]
    assert "--no-llep" not in commands["llep"]
    assert differing(commands["plain"], commands["llep"]) == {"--moe-llep-planner"}
    assert "1e-4" in commands["plain"]


def test_the_control_has_other_micro_batches_of_the_same_batch():
    commands = plan()
    assert differing(commands["plain"], commands["control"]) == {"--micro-batch-size"}
    control = flags_after_split(commands["control"])
    assert control["--micro-batch-size"] == ["2"]
    assert control["--global-batch-size"] == ["16"]
    odd = flags_after_split(plan("--micro-batch-size", "1")["control"])
    assert odd["--micro-batch-size"] == ["2"]


def test_all_start_from_weights_saved_before_the_first_step():
    commands = plan()
    init = flags_after_split(commands["init"])
    assert (init["--lr"], init["--exit-interval"]) == (["0"], ["1"])
    for kind in ("plain", "llep", "control"):
        assert flags_after_split(commands[kind])["--pretrained-checkpoint"] == init["--save"]


@pytest.mark.parametrize("options", [("--load", "x"), ("--hf-load", "x")])
def test_weights_that_are_loaded_anyway_need_no_first_run(options):
    commands = plan(*options)
    assert "init" not in commands
    assert "--pretrained-checkpoint" not in flags_after_split(commands["control"])


def test_another_seed_is_a_control_of_its_own():
    commands = plan(control="seed")
    assert "init" not in commands
    assert differing(commands["plain"], commands["control"]) == {"--seed"}
    assert flags_after_split(commands["control"])["--seed"] == ["1235"]
    assert set(plan(control="none")) == {"plain", "llep"}


def test_each_run_logs_to_wandb_under_its_name_if_asked():
    assert not any("wandb" in word for word in plan()["llep"])
    assert flags_after_split(plan(wandb_project="p")["llep"])["--wandb-exp-name"] == ["llep"]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--hidden-dropout", "0.1"], "--hidden-dropout 0.1: dropout .*--control seed"),
        (["--moe-aux-loss-coeff", "1e-2"], "--moe-aux-loss-coeff 1e-2: the auxiliary loss"),
        (["--moe-aux-loss-coeff", "0", "1e-2"], "--moe-aux-loss-coeff 1e-2"),
        (["--fp8-format", "e4m3"], "--fp8-format e4m3"),
        (["--micro-batch-size", "1", "--global-batch-size", "2"], "neither half nor twice"),
        (["--micro-batch-size", "two"], "--micro-batch-size two: give a whole number"),
        (["--train-iters", "0"], "--train-iters 0: give a whole number"),
        (["--save", "x"], "--save: each run gets a folder of its own"),
        (["--tensorboard-dir", "x"], "--tensorboard-dir: each run"),
        (["--expert-model-parallel-size", "64"], "64 processes"),
    ],
)
def test_what_cannot_be_compared_is_refused(extra, message):
    with pytest.raises(ValueError, match=message):
        plan(*extra)


def test_the_configuration_chooses_the_script_unless_one_is_given():
    assert "--script" not in plan()["llep"]
    given = plan(script=Path("mine.py"))
    assert all(words[words.index("--script") + 1] == "mine.py" for words in given.values())


def test_a_seed_control_allows_dropout():
    assert "control" in plan("--hidden-dropout", "0.1", control="seed")
