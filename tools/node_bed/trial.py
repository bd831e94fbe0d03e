"""One training on the two nodes: what it logs, and what crosses the link meanwhile."""

import re
import statistics
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from node_bed.bed import Node
from node_bed.launch import end_all, start_on

ROOT = Path(__file__).resolve().parents[2]
WARM_UP = 3
"""Iterations that are not counted."""

_ITERATION = re.compile(r"iteration\s+(\d+)/")
_ELAPSED = re.compile(r"elapsed time per iteration \(ms\): ([\d.]+)")
_LOSS = re.compile(r"lm loss: ([\d.E+-]+)")


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What came of one training."""

    step_ms: list[float]
    """Of the iterations that count, as Megatron logs them."""
    step_bytes: float
    """A step's bytes over the link, both ways: at the interfaces, with all headers."""
    losses: list[float]
    """Of all iterations."""

    @property
    def median_ms(self) -> float:
        """Of the steps that count."""
        return statistics.median(self.step_ms)


def train_on(
    nodes: Sequence[Node],
    config: Path,
    flags: Sequence[str],
    *,
    ranks_per_node: int,
    llep: bool,
    port: int,
    log: Path,
    limit: float,
) -> Trial:
    """Train a configuration on both nodes.

    Args:
        nodes: the two; the last rank, which logs, is on the second.
        config: a file as `tools/launch.py` takes it.
        flags: more of the training script.
        ranks_per_node: ranks on each of them.
        llep: with the LLEP flags of the configuration.
        port: for the ranks' meeting.
        log: for what they print.
        limit: seconds after which it counts as a hang.

    Raises:
        RuntimeError: it failed, or took too long; names the log.
    """
    lines: list[str] = []
    counted: dict[int, int] = {}
    running: list[subprocess.Popen[str]] = []
    timer = threading.Timer(limit, end_all, [running])
    timer.daemon = True  # or this process, ended before it is cancelled, would wait for it
    try:
        with log.open("w") as other_log:
            for number, node in enumerate(nodes):
                command = [sys.executable, str(ROOT / "tools" / "launch.py"), str(config)]
                command += [] if llep else ["--no-llep"]
                command += ["--nnodes", str(len(nodes)), "--node-rank", str(number)]
                command += ["--nproc", str(ranks_per_node)]
                command += ["--rdzv-endpoint", f"{nodes[0].address}:{port}", "--", *flags]
                is_last = number == len(nodes) - 1
                running.append(start_on(node, command, subprocess.PIPE if is_last else other_log))
        timer.start()
        logs = running[-1].stdout
        assert logs is not None
        for line in logs:
            lines.append(line)
            if match := _ITERATION.search(line):
                counted[int(match[1])] = sum(node.count_sent() for node in nodes)
        statuses = [each.wait() for each in running]
    finally:
        timer.cancel()
        end_all(running)
    log.write_text(log.read_text() + "".join(lines))
    first, end = WARM_UP, max(counted, default=0)
    if any(statuses) or end <= first:
        raise RuntimeError(f"the training on two nodes failed; see {log}")
    text = "".join(lines)
    return Trial(
        step_ms=[float(value) for value in _ELAPSED.findall(text)][first:],
        step_bytes=(counted[end] - counted[first]) / (end - first),
        losses=[float(value) for value in _LOSS.findall(text)],
    )
