"""The ports at which the ranks of a test meet."""

import socket

import pytest

from support import ports


@pytest.fixture
def given_to_connections(monkeypatch, tmp_path):
    """Let connections be given these ports, and tests run in one process."""
    monkeypatch.delenv("PYTEST_XDIST_WORKER_COUNT", raising=False)
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    monkeypatch.setattr(ports, "OF_CONNECTIONS", tmp_path / "range")

    def write(low, high):
        ports.OF_CONNECTIONS.write_text(f"{low}\t{high}\n")

    return write


def test_no_connection_is_given_one(given_to_connections):
    given_to_connections(20_000, 60_000)
    assert all(not 20_000 <= ports.find_free_port() <= 60_000 for _ in range(100))


def test_connections_may_be_given_any(given_to_connections):
    given_to_connections(1024, 65_535)
    assert ports.LOWEST <= ports.find_free_port() <= ports.HIGHEST


def test_one_in_use_is_not_free(monkeypatch, given_to_connections):
    """Of two ports, one of them taken, the other."""
    with socket.socket() as taken:
        given_to_connections(20_000, 60_000)
        in_use = ports.find_free_port()
        taken.bind(("", in_use))
        monkeypatch.setattr(ports, "LOWEST", in_use)
        given_to_connections(in_use + 2, 65_535)
        assert {ports.find_free_port() for _ in range(50)} == {in_use + 1}


def test_processes_share_none(monkeypatch, given_to_connections):
    given_to_connections(20_000, 60_000)
    monkeypatch.setenv("PYTEST_XDIST_WORKER_COUNT", "2")
    drawn = []
    for worker in ("gw0", "gw1"):
        monkeypatch.setenv("PYTEST_XDIST_WORKER", worker)
        drawn.append({ports.find_free_port() for _ in range(100)})
    assert not drawn[0] & drawn[1]
