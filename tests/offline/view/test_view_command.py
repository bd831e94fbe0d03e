"""`view` as a user runs it: the file, what is printed, what is refused."""

import re

import numpy as np
import pytest
from view_recordings import make_info, make_row, write_planted, write_rows

from megatron_llep.offline.cli import main
from megatron_llep.offline.recording import Recording
from megatron_llep.offline.view.build import Options, build_view
from megatron_llep.offline.view.page import make_page
from megatron_llep.planner.cost.presets import PRESETS


@pytest.fixture
def folder(tmp_path):
    return write_planted(tmp_path / "run<1>")


def view(capsys, *argv):
    status = main(["view", *map(str, argv)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_it_writes_one_file_that_loads_nothing(capsys, folder, tmp_path):
    page = tmp_path / "new" / "page.html"
    status, out, _ = view(capsys, folder, "--output", page)
    assert status == 0
    assert str(page) in out
    text = page.read_text()
    assert "run&lt;1&gt;" in text
    assert "run<1>" not in text
    assert "@" not in re.sub(r"@media", "", re.sub(r"<script type.*?</script>", "", text))
    assert not re.findall(r"""(?:src|href)\s*=\s*["'](?!data:)""", text)
    assert "default-src 'none'" in text
    assert [path.name for path in page.parent.iterdir()] == ["page.html"]


def test_the_page_names_the_assumed_machine(folder):
    text = str(build_view(Recording.open(folder), Options(cost=PRESETS["h100"]))["facts"])
    assert PRESETS["h100"].machine in text


@pytest.mark.parametrize(
    ("info", "flags", "said"),
    [
        ({"ranks_per_host": 2}, [], "2 nodes of 2 ranks, as recorded"),
        (
            {"ranks_per_host": 2, "settings": {"ranks_per_node": 1}},
            [],
            "4 nodes of 1 ranks, as rec",
        ),
        ({"ranks_per_host": 2}, ["--ranks-per-node", 4], "1 node, as told"),
        ({}, [], "1 node, an assumption"),
        ({}, ["--ranks-per-node", 2], "2 nodes of 2 ranks, as told"),
    ],
)
def test_nodes_and_machine_are_told(capsys, tmp_path, info, flags, said):
    folder = write_planted(tmp_path / "run", **info)
    for machine in ("h200", "h100"):
        told = flags if machine == "h200" else [*flags, "--machine", "h100"]
        _, out, _ = view(capsys, folder, "--output", tmp_path / "a.html", *told)
        assert f"nodes: {said}" in out
        assert f"machine: {PRESETS[machine].machine}" in out
        assert ("give --machine" in out) == (machine == "h200")


def test_a_model_gives_the_sizes_that_a_recording_lacks(capsys, tmp_path):
    folder = write_planted(tmp_path / "run", model={})
    _, without, _ = view(capsys, folder, "--output", tmp_path / "a.html")
    _, with_sizes, _ = view(
        capsys, folder, "--output", tmp_path / "a.html", "--model", "gpt-oss-120b"
    )
    assert "predicted" not in without
    assert "predicted" in with_sizes


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--planners", "best"], "--planners best"),
        (["--ranks-per-node", 3], "--ranks-per-node 3"),
        (["--ranks-per-node", 0], "--ranks-per-node 0"),
        (["--max-cells", 0], "--max-cells 0"),
        (["--machine", "b300"], "b300"),
        (["--model", "none"], "none"),
    ],
)
def test_bad_flags_are_refused(capsys, folder, tmp_path, flags, said):
    status, _, err = view(capsys, folder, "--output", tmp_path / "a.html", *flags)
    assert status == 2
    assert said in err
    assert not (tmp_path / "a.html").exists()


def test_a_folder_without_a_recording_is_refused(capsys, tmp_path):
    status, _, err = view(capsys, tmp_path)
    assert status == 2
    assert str(tmp_path) in err


def test_a_place_that_cannot_be_written_is_refused(capsys, folder, tmp_path):
    (tmp_path / "file").write_text("")
    status, _, err = view(capsys, folder, "--output", tmp_path / "file" / "a.html")
    assert status == 2
    assert "--output" in err


def test_a_page_does_not_grow_with_the_run(tmp_path):
    """Eight times the steps, as many columns."""
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 1000, (4, 16))
    sizes = []
    for name, steps in (("short", 20), ("long", 160)):
        rows = [make_row(np.roll(counts, step, axis=1), step=step) for step in range(steps)]
        recording = Recording.open(write_rows(tmp_path / name, rows, make_info()))
        sizes.append(
            len(make_page(build_view(recording, Options(cost=PRESETS["h200"], max_cells=20))))
        )
    assert sizes[1] < 1.2 * sizes[0]
