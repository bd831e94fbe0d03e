"""calibrate over the bed of two nodes: it finds what the link between them is limited to."""

import sys
from pathlib import Path

import pytest

from megatron_llep.planner.cost.model import CostModel

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
from node_bed.bed import NoNamespacesError, join_two_nodes
from node_bed.launch import run_on

RATE = 125e6
"""Bytes a second of the link."""


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("ranks_per_node", [1, 2])
def test_the_link_between_nodes_is_found(ranks_per_node, tmp_path):
    path = tmp_path / "cost.json"
    command = ["-m", "megatron_llep", "calibrate", "--output", str(path)]
    command += ["--ranks-per-node", str(ranks_per_node), "--hidden", "64", "--ffn-hidden", "128"]
    try:
        with join_two_nodes("1gbit") as nodes:
            statuses, said = run_on(
                nodes, command, ranks_per_node=ranks_per_node, port=29410, limit=800
            )
    except NoNamespacesError:
        pytest.skip("network namespaces are not allowed here")
    assert statuses == [0, 0], "".join(said)
    assert "prediction error, uneven exchanges between nodes: " in said[0]
    assert f"2 nodes of {ranks_per_node} ranks" in said[0]
    model = CostModel.load(path)
    mine = RATE / ranks_per_node
    assert model.inter_node.bytes_per_second == pytest.approx(mine, rel=0.2), said[0]
    if ranks_per_node == 1:
        assert model.intra_node == model.inter_node
    else:
        assert model.intra_node.bytes_per_second > model.inter_node.bytes_per_second, said[0]


@pytest.mark.timeout(60)
def test_what_takes_too_long_is_ended():
    try:
        with join_two_nodes("1gbit") as nodes:
            statuses, _ = run_on(
                nodes, ["-m", "timeit", "while 1: pass"], ranks_per_node=1, port=29411, limit=1
            )
    except NoNamespacesError:
        pytest.skip("network namespaces are not allowed here")
    assert statuses == [-9, -9]
