"""The real script: losses, logs, checkpoints, ranks that disagree.

The runs are shared: plain and LLEP, each to the end with a checkpoint half-way, and each from the
other's checkpoint.
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from script_runs import ROOT, Log, run_config, run_ranks_by_hand, run_tiny, tiny_flags
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.distributed.checkpoint import FileSystemReader

STEPS = 6
HALF = 3
TOLERANCE = 1e-5

pytestmark = pytest.mark.timeout(600)  # a fixture may start the script twice

METRICS = (
    "overload_factor_before",
    "overload_factor_after",
    "max_tokens_before",
    "max_tokens_after",
    "lent_experts",
    "lent_mib",
    "lent_link_mib",
    "fallback_rate",
    "plan_ms",
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """A few hundred kilobytes of this project's own source, as bytes."""
    prefix = tmp_path_factory.mktemp("corpus") / "source"
    command = [sys.executable, ROOT / "tools" / "prepare_corpus.py", ROOT / "megatron_llep"]
    command += ["--document-glob", "*.py", "--append-eod", "--output-prefix", prefix]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    return prefix


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def train(corpus, folder):
    """Train to STEPS and save on the way."""

    def train(name: str, *flags: object, llep: bool, **options: Any) -> Log:
        common = ["--data-path", corpus, "--train-iters", STEPS, "--lr", 1e-3]
        # Padding takes part in the loss: 384 rows with TP 1 and 2 alike.
        common += ["--make-vocab-size-divisible-by", 192]
        saving = ["--save", folder / name, "--save-interval", HALF, "--ckpt-format", "torch_dist"]
        logs = ["--tensorboard-dir", folder / f"{name}-tensorboard"]
        return run_tiny([*common, *saving, *logs, *flags], llep=llep, **options)

    return train


@pytest.fixture(scope="module")
def plain(train) -> Log:
    return train("plain", llep=False)


@pytest.fixture(scope="module")
def lending(train, folder) -> Log:
    wandb = ["--wandb-project", "tests", "--wandb-exp-name", "lending"]
    wandb += ["--wandb-save-dir", folder / "wandb", "--moe-per-layer-logging"]
    return train("lending", *wandb, llep=True)


@pytest.fixture(scope="module")
def plain_from_lending(train, lending, folder) -> Log:
    return train("plain-2", "--load", folder / "lending", "--ckpt-step", HALF, llep=False)


@pytest.fixture(scope="module")
def lending_from_plain(train, plain, folder) -> Log:
    return train("lending-2", "--load", folder / "plain", "--ckpt-step", HALF, llep=True)


Scalars = dict[str, dict[int, float]]
"""Name -> step -> value."""


@pytest.fixture(scope="module")
def scalars(folder):
    """What a run has written for TensorBoard."""

    def read(name: str) -> Scalars:
        events = EventAccumulator(str(folder / f"{name}-tensorboard")).Reload()
        return {
            tag: {event.step: event.value for event in events.Scalars(tag)}
            for tag in events.Tags()["scalars"]
        }

    return read


def test_losses_are_those_of_plain_megatron(plain, lending, scalars):
    assert list(plain.losses) == list(range(1, STEPS + 1))
    assert lending.losses == pytest.approx(plain.losses, rel=TOLERANCE)
    expected, actual = scalars("plain"), scalars("lending")
    assert actual["lm loss"] == pytest.approx(expected["lm loss"], rel=TOLERANCE)
    assert actual["grad-norm"] == pytest.approx(expected["grad-norm"], rel=1e-4)


def test_console_line(plain, lending):
    before = lending.read("overload_factor_before")
    after = lending.read("overload_factor_after")
    assert before.keys() == after.keys() == lending.losses.keys()
    assert all(after[step] < before[step] for step in before)
    for name in METRICS:
        assert lending.read(name).keys() == before.keys()
        assert not plain.read(name)
    assert all(count > 0 for count in lending.read("lent_experts").values())


def test_tensorboard(lending, plain, scalars):
    logged = scalars("lending")
    for name in METRICS:
        # The console rounds to two decimals.
        assert logged[f"moe/llep/{name}"] == pytest.approx(lending.read(name), abs=0.0051)
        assert f"moe/llep/{name}_layer_0" in logged
        assert f"moe/llep/{name}_layer_1" in logged
    before, after = (logged[f"moe/llep/max_tokens_{when}"] for when in ("before", "after"))
    assert max(after.values()) <= max(before.values())
    assert not any("llep" in name for name in scalars("plain"))


def test_wandb(lending, folder):
    wandb_folder = folder / "wandb" / "wandb"
    records = next(wandb_folder.glob("offline-run-*/run-*.wandb")).read_bytes()
    for name in METRICS:
        assert f"moe/llep/{name}".encode() in records


@pytest.fixture(scope="module")
def assert_resumed(plain, scalars):
    def check(name: str, resumed: Log) -> None:
        assert "successfully loaded checkpoint" in resumed.text
        # Not from the console: after the first step of a run Megatron does not reset the sum of
        # losses that it prints the mean of.
        for tag, tolerance in (("lm loss", TOLERANCE), ("grad-norm", 1e-4)):
            whole = {step: value for step, value in scalars("plain")[tag].items() if step > HALF}
            assert scalars(name)[tag] == pytest.approx(whole, rel=tolerance)

    return check


def test_plain_megatron_resumes_from_llep(plain_from_lending, assert_resumed):
    assert_resumed("plain-2", plain_from_lending)
    assert not plain_from_lending.read("lent_experts")


def test_llep_resumes_from_plain_megatron(lending_from_plain, assert_resumed):
    assert_resumed("lending-2", lending_from_plain)
    assert all(count > 0 for count in lending_from_plain.read("lent_experts").values())


EP4 = {"expert-model-parallel-size": 4}
TP2 = {"tensor-model-parallel-size": 2, "sequence-parallel": True}
PP2 = {"pipeline-model-parallel-size": 2}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "llep", "layout"),
    [
        ("lending", False, EP4),
        ("plain", True, EP4),
        ("lending", False, TP2),
        ("plain", True, TP2),
        ("lending", True, PP2),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else str(value),
)
def test_training_goes_on_in_another_layout(source, llep, layout, request, folder, train, scalars):
    """Weights and Adam's moments: without either the losses differ."""
    request.getfixturevalue(source)
    request.getfixturevalue("plain")
    name = "-".join([source, str(llep), *layout])
    log = train(name, "--load", folder / source, "--ckpt-step", HALF, llep=llep, layout=layout)
    assert "successfully loaded checkpoint" in log.text
    for tag, tolerance in (("lm loss", TOLERANCE), ("grad-norm", 1e-3)):
        whole = {step: value for step, value in scalars("plain")[tag].items() if step > HALF}
        assert scalars(name)[tag] == pytest.approx(whole, rel=tolerance)
    assert llep == any(count > 0 for count in log.read("lent_experts").values())


def test_checkpoints_hold_the_same(plain, lending, folder):
    def read_entries(name: str) -> dict[str, object]:
        path = folder / name / f"iter_{STEPS:07d}"
        metadata = FileSystemReader(path).read_metadata().state_dict_metadata
        # The size of a tensor; what is no tensor has none.
        return {key: getattr(entry, "size", None) for key, entry in metadata.items()}

    entries = read_entries("lending")
    assert entries == read_entries("plain")
    assert any(key.startswith("optimizer.state.exp_avg.") for key in entries)


@pytest.mark.slow
def test_ranks_that_disagree_end_with_the_same_error():
    flags = tiny_flags("--mock-data", "--train-iters", "2")
    without = tiny_flags("--mock-data", "--train-iters", "2", without=["--moe-llep"])
    for text in run_ranks_by_hand([flags, without], timeout=150):
        assert "ValueError: LLEP settings differ between ranks" in text
        assert "--moe-llep: [True, False]" in text
        assert text.endswith("exit code 1")
        assert "iteration        1/" not in text


def test_a_bad_setting_ends_the_script_before_the_ranks_meet():
    # Two ranks are awaited and one comes: any process group would wait for the other.
    flags = tiny_flags("--mock-data", "--moe-llep-planner", "best")
    [text] = run_ranks_by_hand([flags], timeout=150)
    assert "ValueError: --moe-llep-planner best: choose one of" in text
    assert text.endswith("exit code 1")


LAYOUTS = {
    "TP2xEP2": ({"tensor-model-parallel-size": 2, "sequence-parallel": True}, []),
    "PP2xEP2": ({"pipeline-model-parallel-size": 2}, []),
    "PP2xVPP2xEP2": (
        {"pipeline-model-parallel-size": 2},
        ["--num-layers", 4, "--num-layers-per-virtual-pipeline-stage", 1],
    ),
    "EP2xDP2": (
        {"expert-model-parallel-size": 2},
        ["--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"],
    ),
    "EP2 bf16": ({}, ["--bf16"]),
    "EP2 full recompute": (
        {},
        [
            *("--recompute-granularity", "full", "--recompute-method", "uniform"),
            *("--recompute-num-layers", 1),
        ],
    ),
    "EP2 bf16, overlapped exchange": (
        {},
        [
            *("--bf16", "--overlap-moe-expert-parallel-comm"),
            "--ep-overlap-early-attn-memory-release",
        ],
    ),
    "EP2 validation": ({}, ["--eval-interval", 2, "--eval-iters", 1, "--log-interval", 2]),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_and_modes(name, corpus):
    layout, flags = LAYOUTS[name]
    processes = 4 if name == "EP2xDP2" else None
    flags = ["--data-path", corpus, "--train-iters", 4, *flags]
    runs = [
        run_tiny(flags, llep=llep, layout=layout, processes=processes) for llep in (False, True)
    ]
    tolerance = 5e-3 if "bf16" in name else TOLERANCE
    assert runs[1].losses == pytest.approx(runs[0].losses, rel=tolerance)
    assert runs[1].losses[4] > 0
    assert any(count > 0 for count in runs[1].read("lent_experts").values())


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_small_deepseek():
    layout, flags = LAYOUTS["TP2xEP2"]
    flags = ["--mock-data", "--train-iters", 4, "--seq-length", 32, *flags]
    config = ROOT / "configs" / "tiny-deepseek.yaml"
    runs = [
        run_config(config, flags, llep=llep, layout=layout, timeout=500.0) for llep in (False, True)
    ]
    for loss in ("lm loss", "mtp_1 loss"):
        plain, lending = (run.read(loss) for run in runs)
        assert len(plain) == 4
        assert lending == pytest.approx(plain, rel=TOLERANCE)
    assert any(count > 0 for count in runs[1].read("lent_experts").values())
