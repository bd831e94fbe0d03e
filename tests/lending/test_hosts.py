"""Nodes are found by the ranks' hostnames, and a model trains over them as over one."""

import contextlib
import io
import socket
from dataclasses import replace

import pytest

from megatron_llep import LLEPConfig, convert_model
from megatron_llep.layer import LLEPMoELayer
from megatron_llep.planner.topology import find_ranks_per_node
from support.layout import Layout
from support.llep import EAGER, assert_same_run, train_with_llep
from support.ranks import run_ranks
from support.routing import Routing
from support.training import Run, train


@pytest.mark.parametrize(
    ("hosts", "expected"),
    [
        ("aaaa", 4),
        ("aabb", 2),
        ("abcd", 1),
        ("aab", None),
        ("abab", None),
        ("abba", None),
        ("a", 1),
    ],
)
def test_ranks_on_each_node(hosts, expected):
    assert find_ranks_per_node(hosts) == expected


@pytest.mark.parametrize(
    ("hosts", "given", "expected"), [("aabb", "auto", 2), ("abab", None, None), ("aabb", 4, 4)]
)
def test_training_over_hosts(hosts, given, expected):
    run = Run(layout=Layout(ep=4), routing=Routing("hot", 4), micro_batches=8)

    def work(rank, size):
        found = []

        def note(chunks):
            layers = [m for c in chunks for m in c.modules() if isinstance(m, LLEPMoELayer)]
            found.extend(layer.token_dispatcher.topology.ranks_per_node for layer in layers)

        def convert(chunks):
            convert_model(chunks, replace(EAGER, ranks_per_node=given))
            note(chunks)

        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr(socket, "gethostname", lambda: hosts[rank])
            said = io.StringIO()
            with contextlib.redirect_stdout(said):
                lending = train(run, transform_model=convert)
            assert set(found) == {expected}
        assert_same_run(lending, train(run))
        return said.getvalue()

    assert ("count as one node" in run_ranks(work, 4)[0]) == (expected is None)


def test_training_over_nodes_lends():
    run = Run(layout=Layout(ep=4), routing=Routing("hot", 4), micro_batches=8)

    def work(rank, size):
        return train_with_llep(run, replace(EAGER, ranks_per_node=2)).observed

    assert run_ranks(work, 4)[0].transfers > 0


def test_auto_is_the_default():
    assert LLEPConfig(ranks_per_node="auto") == LLEPConfig()
