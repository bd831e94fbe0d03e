"""Reading what runs leave behind: TensorBoard folders and wandb runs."""

import numpy as np
import pytest
from run_logs import make_loss, write_events

from megatron_llep.offline.compare.read import read_run
from megatron_llep.offline.compare.wandb_file import BLOCK, read_records

LOSS = make_loss(40)


def test_a_folder_is_read(tmp_path):
    write_events(tmp_path / "plain" / "tensorboard", {"lm loss": LOSS}, step_seconds=0.5)
    run = read_run(tmp_path / "plain")
    assert run.name == "plain"
    assert run.curve("lm loss").values == pytest.approx(LOSS)
    assert run.curve("lm loss").seconds == pytest.approx(np.arange(40) * 0.5)


def test_one_file_is_read(tmp_path):
    write_events(tmp_path, {"lm loss": LOSS})
    (file,) = tmp_path.glob("*tfevents*")
    assert read_run(file).curve("lm loss").steps.size == 40


def test_the_files_of_a_resumed_run_are_joined(tmp_path):
    write_events(tmp_path, {"lm loss": LOSS[:30] + 1}, start=1000)
    write_events(tmp_path, {"lm loss": LOSS[20:]}, first_step=21, start=9000)
    curve = read_run(tmp_path).curve("lm loss")
    assert curve.values == pytest.approx(np.concatenate([LOSS[:20] + 1, LOSS[20:]]))
    assert curve.seconds[-1] == pytest.approx(38)


def test_folders_below_are_phases_if_they_follow_each_other(tmp_path):
    write_events(tmp_path / "second", {"lm loss": LOSS[20:]}, first_step=21, start=9000)
    write_events(tmp_path / "first", {"lm loss": LOSS[:20]})
    assert read_run(tmp_path).curve("lm loss").values == pytest.approx(LOSS)
    paths = [tmp_path / "first", tmp_path / "second"]
    assert read_run(paths, "joined").curve("lm loss").values == pytest.approx(LOSS)


def test_a_folder_of_several_runs_is_refused(tmp_path):
    for run in ("plain", "llep"):
        write_events(tmp_path / run, {"lm loss": LOSS})
    with pytest.raises(ValueError, match="different runs; give the folder of one of them"):
        read_run(tmp_path)


def test_a_file_that_is_cut_off_is_read_as_far_as_it_is(tmp_path):
    write_events(tmp_path, {"lm loss": LOSS})
    (file,) = tmp_path.glob("*tfevents*")
    file.write_bytes(file.read_bytes()[:-20])
    assert read_run(tmp_path).curve("lm loss").values == pytest.approx(LOSS[:39])


def test_nan_stays_nan(tmp_path):
    write_events(tmp_path, {"lm loss": np.array([1, np.nan, 3])})
    assert np.isnan(read_run(tmp_path).curve("lm loss").values).tolist() == [False, True, False]


def test_unusable_paths_are_refused(tmp_path):
    with pytest.raises(ValueError, match="nowhere: no such folder"):
        read_run(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"no TensorBoard event file .* and no wandb run"):
        read_run(tmp_path)
    write_events(tmp_path, {})
    with pytest.raises(ValueError, match="no scalar"):
        read_run(tmp_path)
    (tmp_path / "run-1.wandb").write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"run-1\.wandb is no wandb run"):
        read_run(tmp_path / "run-1.wandb")


@pytest.fixture(scope="module")
def wandb_folder(tmp_path_factory):
    """An offline run that wandb itself has written, longer than a block of its file."""
    wandb = pytest.importorskip("wandb")
    folder = tmp_path_factory.mktemp("wandb")
    settings = wandb.Settings(silent=True, console="off", x_disable_stats=True)
    with wandb.init(
        project="p", name="plain", dir=str(folder), mode="offline", settings=settings
    ) as run:
        for step, value in enumerate(LOSS, start=1):
            many = {f"moe/llep/plan_ms_layer_{layer}": step + layer for layer in range(30)}
            run.log({"lm loss": float(value), "text": "no number", **many}, step=step)
        run.log({"lm loss": float("nan")}, step=41)
    wandb.teardown()  # as at the end of a program: all is written
    return folder


def test_a_wandb_run_is_read(wandb_folder):
    (file,) = wandb_folder.rglob("*.wandb")
    assert file.stat().st_size > 2 * BLOCK
    run = read_run(wandb_folder, "plain")
    curve = run.curve("lm loss")
    assert curve.steps.tolist() == list(range(1, 42))
    assert curve.values[:40] == pytest.approx(LOSS)
    assert np.isnan(curve.values[40])
    assert run.stacked("moe/llep/plan_ms")[:, 9].tolist() == [10 + layer for layer in range(30)]
    assert (np.diff(curve.seconds) >= 0).all()
    assert "text" not in run.curves


def test_a_wandb_run_that_is_cut_off_is_read_as_far_as_it_is(wandb_folder, tmp_path):
    (file,) = wandb_folder.rglob("*.wandb")
    whole = list(read_records(file))
    cut = tmp_path / "run-cut.wandb"
    cut.write_bytes(file.read_bytes()[: BLOCK + 1000])
    part = list(read_records(cut))
    assert 0 < len(part) < len(whole)
    assert part == whole[: len(part)]
    steps = read_run(tmp_path).curve("lm loss").steps
    assert steps.tolist() == list(range(1, steps.size + 1))


def test_tensorboard_comes_first_where_a_run_has_both(wandb_folder, tmp_path):
    (file,) = wandb_folder.rglob("*.wandb")
    (tmp_path / file.name).write_bytes(file.read_bytes())
    write_events(tmp_path, {"lm loss": LOSS[:5]})
    assert read_run(tmp_path).curve("lm loss").steps.size == 5
