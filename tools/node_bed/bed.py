"""Two network namespaces and the link between them; what it takes is taken down again."""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

BURST = "256kb"
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
            limit = ["tc", "qdisc", "add", "dev", node.device, "root", "tbf"]
            limit += ["rate", rate, "burst", BURST, "latency", LATENCY]
            result = subprocess.run(node.command(limit), capture_output=True, text=True)
            if result.returncode:
                raise ValueError(f"--rate {rate}: {result.stderr.strip()}; give such as 100mbit")
        yield one, other
    finally:
        for node in nodes:
            _take_down(node)


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
