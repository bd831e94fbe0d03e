"""The flags that say what is routed where, for `plan` and `simulate`."""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np

from megatron_llep.offline.workloads import WORKLOADS, TracedLayer, make_counts, read_trace


def add_routing_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what both commands have."""
    parser.add_argument(
        "--trace",
        type=Path,
        metavar="FOLDER",
        help="instead of a workload: what a run with --moe-llep-record or "
        "--moe-routing-trace-path wrote; ranks and experts follow from a recording, and its "
        "ranks may be split evenly into a multiple",
    )
    parser.add_argument(
        "--repeat-experts",
        action="store_true",
        help="let a token choose an expert several times, as the published LLEP benchmark does: "
        "95%% into 1 expert is then 95%% of all (token, expert) pairs; without it at most 1 / K",
    )
    parser.add_argument(
        "--ranks-per-node",
        type=int,
        help="consecutive ranks that share a node; default: as recorded, else all",
    )
    parser.add_argument("--seed", type=int, default=0)


def list_workloads() -> str:
    """All workloads with what they are, for a command's help."""
    return "workloads:\n" + "\n".join(f"  {w.name:13} {w.summary}" for w in WORKLOADS.values())


def workload_counts(
    name: str,
    *,
    num_ranks: int,
    num_experts: int,
    tokens: int,
    top_k: int,
    seed: int,
    repeat_experts: bool,
) -> Callable[[int, int], np.ndarray]:
    """(layer, step) -> counts [P, E]; each layer has a seed of its own."""
    if repeat_experts:
        tokens, top_k = tokens * top_k, 1

    def counts(layer: int, step: int) -> np.ndarray:
        return make_counts(
            name,
            num_ranks=num_ranks,
            num_experts=num_experts,
            tokens_per_rank=tokens,
            top_k=top_k,
            seed=seed + layer,
            step=step,
        )

    return counts


def trace_counts(
    folder: Path, num_ranks: int, num_experts: int
) -> tuple[Callable[[int, int], np.ndarray], int, int]:
    """(layer, step) -> counts [P, E] of a trace, its layers and its micro-batches.

    After the last micro-batch the trace starts again.
    """
    batches: dict[tuple[int, int, int], list[TracedLayer]] = {}
    for traced in read_trace(folder, num_ranks=num_ranks, num_experts=num_experts):
        batches.setdefault((traced.step, traced.call, traced.group), []).append(traced)
    rows = list(batches.values())
    layers = len(rows[0])

    def counts(layer: int, step: int) -> np.ndarray:
        return rows[step % len(rows)][layer].counts

    if any(len(row) != layers for row in rows):
        raise ValueError(f"{folder}: micro-batches differ in their number of layers: was it cut?")
    return counts, layers, len(rows)
