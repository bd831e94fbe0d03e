"""The bed of two nodes: what it says where it cannot be set up, and a training over it."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
from node_bed import bed, trial
from node_bed.bed import Node, NoNamespacesError, join_two_nodes

ROOT = Path(__file__).resolve().parents[2]


def can_join() -> bool:
    try:
        with join_two_nodes("100mbit"):
            return True
    except NoNamespacesError:
        return False


def list_namespaces() -> str:
    return subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout


def test_it_says_so_where_there_is_no_iproute2(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(NoNamespacesError, match="iproute2"), join_two_nodes("100mbit"):
        pass


def use_and_fail():
    with join_two_nodes("10mbit") as (one, other):
        assert one.namespace in list_namespaces()
        talk = f"import socket; socket.create_connection(('{other.address}', 9), 5)"
        refused = subprocess.run(
            one.command([sys.executable, "-c", talk]), capture_output=True, text=True
        )
        assert "ConnectionRefusedError" in refused.stderr
        assert one.count_sent() > 0
        subprocess.Popen(other.command(["sleep", "60"]))
        raise KeyError


def test_all_is_taken_down_again():
    if not can_join():
        pytest.skip("network namespaces are not allowed here")
    before = list_namespaces()
    with pytest.raises(ValueError, match="--rate fast"), join_two_nodes("fast"):
        pass
    with pytest.raises(KeyError):
        use_and_fail()
    assert list_namespaces() == before


RECEIVE = """
import socket
socket.setdefaulttimeout(30)
server = socket.create_server(("0.0.0.0", 7777))
print("ready", flush=True)
connection, _ = server.accept()
while connection.recv(2**16):
    pass
connection.sendall(b".")
"""
SEND = """
import socket, sys, time
with socket.create_connection((sys.argv[1], 7777), 10) as connection:
    time.sleep(0.1)
    start = time.perf_counter()
    connection.sendall(bytes(100_000))
    connection.shutdown(socket.SHUT_WR)
    connection.recv(1)
    print(time.perf_counter() - start)
"""


def test_a_pause_saves_up_little():
    """100 kB are limited from their first packets on, as on a wire."""
    if not can_join():
        pytest.skip("network namespaces are not allowed here")
    with join_two_nodes("10mbit") as (one, other):
        command = other.command([sys.executable, "-c", RECEIVE])
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as receiver:
            assert receiver.stdout is not None
            assert receiver.stdout.readline() == "ready\n"
            command = one.command([sys.executable, "-c", SEND, other.address])
            sent = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert float(sent.stdout) > 0.95 * 100_000 / 1_250_000, sent.stderr


def test_it_is_taken_down_when_it_is_ended(tmp_path):
    if not can_join():
        pytest.skip("network namespaces are not allowed here")
    before = list_namespaces()
    command = [sys.executable, str(ROOT / "tools" / "two_nodes.py"), "--methods", "plain"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        assert "plain" in running.stdout.readline()  # the nodes are there
        assert list_namespaces() != before
        running.terminate()
        assert running.wait(60) == 143
    assert list_namespaces() == before


def test_a_signal_does_not_stop_the_taking_down(monkeypatch):
    if not can_join():
        pytest.skip("network namespaces are not allowed here")
    before, take_down = list_namespaces(), bed._take_down

    def be_told_to_end(node):
        os.kill(os.getpid(), signal.SIGTERM)
        take_down(node)

    monkeypatch.setattr(bed, "_take_down", be_told_to_end)
    handler = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        with join_two_nodes("100mbit"):
            pass
        assert signal.getsignal(signal.SIGTERM) not in (signal.SIG_IGN, handler)
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert list_namespaces() == before


ASLEEP = f"60.{os.getpid()}"
"""Seconds, which name the process that sleeps them."""


class Asleep(Node):
    """A node of this machine, on which nothing trains."""

    def command(self, command):
        return ["sleep", ASLEEP]


def find_asleep() -> list[Path]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended
            found += [path] if ASLEEP.encode() in path.read_bytes() else []
    return found


def test_nothing_is_left_of_a_training_that_is_ended_as_it_starts(tmp_path, monkeypatch):
    def start_and_end(timer):
        threading.Thread.start(timer)
        assert len(find_asleep()) == 2
        sys.exit(143)

    monkeypatch.setattr(threading.Timer, "start", start_and_end)
    nodes = [Asleep(namespace=name, device=name, address="127.0.0.1") for name in ("one", "other")]
    with pytest.raises(SystemExit):
        trial.train_on(
            nodes,
            tmp_path / "config.yaml",
            [],
            ranks_per_node=1,
            llep=False,
            port=1,
            log=tmp_path / "log",
            limit=60,
        )
    assert not find_asleep()
    left = [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]
    for thread in left:
        thread.join(5)
        assert not thread.is_alive()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_training_over_two_nodes(tmp_path):
    """Losses as plain's, and what crosses is what is predicted, but for the rest of the model."""
    if not can_join():
        pytest.skip("network namespaces are not allowed here")
    output = tmp_path / "nodes.json"
    command = [sys.executable, str(ROOT / "tools" / "two_nodes.py"), "--rate", "200mbit"]
    command += ["--iterations", "6", "--methods", "tolerant", "--output", str(output)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stdout + done.stderr
    plain, lending = json.loads(output.read_text())["methods"]
    rest = [each["mib_across"] - each["predicted_mib"] for each in (plain, lending)]
    assert lending["predicted_mib"] < plain["predicted_mib"]
    assert abs(rest[0] - rest[1]) < 0.1 * (plain["mib_across"] - lending["mib_across"])
