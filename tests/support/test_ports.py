"""The ports at which the ranks of a test meet."""

import socket

from support import ports


def test_no_connection_is_given_one():
    low, high = map(int, ports.OF_CONNECTIONS.read_text().split())
    assert all(not low <= ports.find_free_port() <= high for _ in range(100))


def test_one_in_use_is_not_free(monkeypatch, tmp_path):
    """Of two ports, one of them taken, the other."""
    monkeypatch.setattr(ports, "OF_CONNECTIONS", tmp_path / "range")
    ports.OF_CONNECTIONS.write_text("10002\t65535\n")
    monkeypatch.delenv("PYTEST_XDIST_WORKER_COUNT", raising=False)
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    with socket.socket() as taken:
        taken.bind(("", 10_000))
        assert {ports.find_free_port() for _ in range(50)} == {10_001}


def test_processes_share_none(monkeypatch):
    monkeypatch.setenv("PYTEST_XDIST_WORKER_COUNT", "2")
    drawn = []
    for worker in ("gw0", "gw1"):
        monkeypatch.setenv("PYTEST_XDIST_WORKER", worker)
        drawn.append({ports.find_free_port() for _ in range(100)})
    assert not drawn[0] & drawn[1]
