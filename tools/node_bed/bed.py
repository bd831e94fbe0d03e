"""Two network namespaces and the link between them; what it takes is taken down again."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

BURST_SECONDS = 6e-4
"""What passes at once after a pause, in time of the rate. A wire lets nothing pass; here timers
wake too seldom for that, and from 1 Gbit/s on what the kernel hands on as one, 70 KB, must fit."""
LEAST_BURST, MOST_BURST = 3_000, 2**18
"""In bytes: two packets of an Ethernet; more than the latter brings no more at 10 Gbit/s."""
LATENCY = "50ms"
"""How long a packet waits for the rate at most, before it is dropped."""


class NoNamespacesError(RuntimeError):
    """This machine does not let this user set up nodes."""


@dataclass(frozen=True, kw_only=True)
class Node:
    """One of the two."""

    namespace: str
    device: str
    address: str

    def command(self, command: Sequence[str]) -> list[str]:
        """The command that runs another one on this node."""
        return ["ip", "netns", "exec", self.namespace, *command]

    def count_sent(self) -> int:
        """Bytes that left over the link so far, with all headers."""
        counter = f"/sys/class/net/{self.device}/statistics/tx_bytes"
        return int(_run(self.command(["cat", counter])))


@contextlib.contextmanager
def join_two_nodes(rate: str) -> Iterator[tuple[Node, Node]]:
    """Set up two nodes whose link carries so much each way, and take them down, whatever happens.

    Args:
        rate: as `tc` reads it: 100mbit, 10gbit.

    Raises:
        NoNamespacesError: no iproute2, or no right to make namespaces.
        ValueError: a rate that `tc` does not take.
    """
    if not (shutil.which("ip") and shutil.which("tc")):
        raise NoNamespacesError("ip and tc are not installed: install iproute2")
    tag = f"llep{os.getpid()}"
    nodes = tuple(
        Node(namespace=f"{tag}n{i}", device=f"{tag[:12]}v{i}", address=f"10.77.0.{i + 1}")
        for i in (0, 1)
    )
    try:
        for node in nodes:
            _set_up(["ip", "netns", "add", node.namespace])
        one, other = nodes
        _set_up(
            [
                *("ip", "link", "add", one.device, "netns", one.namespace, "type", "veth"),
                *("peer", "name", other.device, "netns", other.namespace),
            ]
        )
        for node in nodes:
            _set_up(node.command(["ip", "link", "set", "lo", "up"]))
            _set_up(
                node.command(["ip", "address", "add", f"{node.address}/24", "dev", node.device])
            )
            _set_up(node.command(["ip", "link", "set", node.device, "up"]))
            _limit(node, rate)
        yield one, other
    finally:
        with _undisturbed():
            for node in nodes:
                _take_down(node)


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Let no signal interrupt what is done meanwhile."""
    before = {
        number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _limit(node: Node, rate: str) -> None:
    """Hold what leaves the node to a rate."""
    command = node.command(["tc", "qdisc", "replace", "dev", node.device, "root", "tbf"])
    limits = ["rate", rate, "latency", LATENCY, "burst"]
    result = subprocess.run([*command, *limits, str(MOST_BURST)], capture_output=True, text=True)
    if result.returncode:
        raise ValueError(f"--rate {rate}: {result.stderr.strip()}; give such as 100mbit")
    # Only now is it known how many bytes a second that is.
    (limiter,) = json.loads(_run(node.command(["tc", "-j", "qdisc", "show", "dev", node.device])))
    burst = min(max(limiter["options"]["rate"] * BURST_SECONDS, LEAST_BURST), MOST_BURST)
    _set_up([*command, *limits, str(round(burst))])


def _set_up(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise NoNamespacesError(
            f"{' '.join(command)}: {result.stderr.strip()}; run it as root, where network "
            "namespaces are allowed"
        )


def _take_down(node: Node) -> None:
    """End what still runs on the node, and remove it; its device goes with it."""
    if not Path("/run/netns", node.namespace).exists():
        return
    pids = _run(["ip", "netns", "pids", node.namespace]).split()
    if pids:
        subprocess.run(["kill", "-KILL", *pids], capture_output=True)
    subprocess.run(["ip", "netns", "delete", node.namespace], capture_output=True)


def _run(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
