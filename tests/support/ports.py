"""TCP ports at which the ranks of a test meet."""

import contextlib
import os
import random
import socket
from pathlib import Path

LOWEST, HIGHEST = 10_000, 65_535
OF_CONNECTIONS = Path("/proc/sys/net/ipv4/ip_local_port_range")


def find_free_port() -> int:
    """A port that nobody listens on, and that nobody takes before the ranks do.

    Not one that the kernel names: the next connection of another test may be given the same.
    Each of the processes that run tests draws from ports of its own.
    """
    low, high = map(int, OF_CONNECTIONS.read_text().split())
    ports = [*range(LOWEST, low), *range(high + 1, HIGHEST + 1)]
    ports = ports or [*range(LOWEST, HIGHEST + 1)]  # connections may be given any
    own = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    ports = ports[own :: int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))]
    draw = random.SystemRandom()  # tests may have seeded the other
    while True:
        port = draw.choice(ports)
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("", port))
            return port
