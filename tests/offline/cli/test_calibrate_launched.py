"""calibrate as torchrun starts it: one process for each rank, which find their nodes."""

import contextlib
import io
import os
import socket
from collections.abc import Sequence
from datetime import timedelta

import pytest

from megatron_llep.offline.calibration import group
from megatron_llep.offline.cli import main
from megatron_llep.planner.cost.model import CostModel
from support.ports import find_free_port
from support.ranks import run_ranks

SMALL = ["--quick", "--hidden", "16", "--ffn-hidden", "16"]


def be_launched(
    rank: int, size: int, hosts: str, port: int, world: int, flags: Sequence[str]
) -> tuple[int, str]:
    """Status, and what is printed, of one rank of `world`, each on the host of its letter."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(world), "TORCHELASTIC_RUN_ID": "test"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    socket.gethostname = lambda: hosts[rank]
    group.LIMIT = timedelta(seconds=5 if world > len(hosts) else 100)
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        status = main(["calibrate", *flags])
    return status, said.getvalue()


def launch(hosts: str, *flags: str, world: int | None = None) -> list[tuple[int, str]]:
    """Status, and what is printed, of a rank on each of these hosts."""
    port = find_free_port()
    arguments = (hosts, port, world or len(hosts), flags)
    return run_ranks(be_launched, len(hosts), *arguments, timeout=200, in_group=False)


@pytest.mark.parametrize(
    ("hosts", "told", "words"),
    [
        ("aabb", [], "2 nodes of 2 ranks, as their hostnames tell"),
        ("aa", ["--ranks-per-node", "1"], "2 nodes of 1 ranks, as told"),
        ("aa", [], "1 node, as their hostnames tell"),
    ],
)
def test_ranks_measure_together(hosts, told, words, tmp_path):
    path = tmp_path / "cost.json"
    (first, out), *others = launch(hosts, *SMALL, *told, "--output", str(path))
    assert first == 0, out
    assert others == [(0, "")] * len(others)
    assert f"measuring experts, copies and transfers on {words} ..." in out
    inside, across = len(hosts) > 2 or not told, not words.startswith("1 node")
    for kind in ("transfers", "uneven exchanges"):
        assert (f"prediction error, {kind}: " in out) == inside
        assert (f"prediction error, {kind} between nodes: " in out) == across
    assert ("one rank a node has nobody inside it" in out) == (not inside)
    model = CostModel.load(path)
    assert (model.intra_node == model.inter_node) == (not inside or not across)
    assert ("nodes of" in model.machine) == across


@pytest.mark.parametrize(
    ("hosts", "flags", "message"),
    [
        ("aba", [], "{'a': 2, 'b': 1}"),
        ("ab", ["--ranks-per-node", "0"], "--ranks-per-node 0 does not divide the 2 ranks"),
        ("ab", ["--inter-node-bandwidth", "3"], "--inter-node-bandwidth 3: between these 2 nodes"),
        ("a", [], "--links: one rank cannot measure"),
    ],
)
def test_nodes_that_make_no_sense(hosts, flags, message):
    for status, said in launch(hosts, *SMALL, *flags):
        assert status == 2
        assert message in said


def test_a_missing_rank_is_an_error():
    ((status, said),) = launch("a", *SMALL, world=2)
    assert status == 2
    assert "the 2 ranks did not meet at 127.0.0.1 within 5 s" in said


def test_torchrun_says_how_many_ranks(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["calibrate", "--ranks", "2"]) == 2
    assert "--ranks 2: torchrun has started the ranks" in capsys.readouterr().err
