"""Commands that launch ranks, on the two nodes."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from node_bed.bed import Node


def run_on(
    nodes: Sequence[Node],
    command: Sequence[str],
    *,
    ranks_per_node: int,
    port: int,
    limit: float,
) -> tuple[list[int], list[str]]:
    """Run it, and wait for it.

    Args:
        nodes: rank 0 is on the first.
        command: what torchrun takes: `-m module ...` or a script and its flags.
        ranks_per_node: how many on each.
        port: for the ranks' meeting.
        limit: seconds after which all is ended.

    Returns:
        Exit status, and what was printed, of each node; -9 where it was ended.
    """
    running: list[subprocess.Popen[str]] = []
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", str(len(nodes))]
    torchrun += ["--nproc-per-node", str(ranks_per_node), "--rdzv-backend", "static"]
    torchrun += ["--rdzv-endpoint", f"{nodes[0].address}:{port}"]
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder, node.namespace) for node in nodes]
        try:
            for number, (node, log) in enumerate(zip(nodes, logs, strict=True)):
                with log.open("w") as stream:
                    launch = [*torchrun, "--node-rank", str(number), *command]
                    running.append(start_on(node, launch, stream))
            until = time.monotonic() + limit
            while any(each.poll() is None for each in running) and time.monotonic() < until:
                time.sleep(0.1)
        finally:
            end_all(running)
        return [each.returncode for each in running], [log.read_text() for log in logs]


def start_on(node: Node, command: Sequence[str], stdout: int | TextIO) -> subprocess.Popen[str]:
    """Start a command that launches ranks, which talk over the node's link.

    Args:
        node: where.
        command: which.
        stdout: as of Popen, for errors, too.
    """
    settings = {"GLOO_SOCKET_IFNAME": node.device, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        node.command(command),
        env=os.environ | settings,
        stdout=stdout,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def end_all(running: Sequence[subprocess.Popen[str]]) -> None:
    """End what still runs, ranks too."""
    for each in running:
        if each.poll() is None:
            os.killpg(each.pid, signal.SIGKILL)
            each.wait()
