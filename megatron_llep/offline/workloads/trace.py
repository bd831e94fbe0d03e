"""Replay of the routing that Megatron traced with `--moe-routing-trace-path`.

Megatron 0.19 (core/transformer/moe/router_trace.py) writes `router_trace_rank<rank>.jsonl`, a line
for each call of a router: step, block ("decoder" or "mtp", the latter with mtp_idx), layer, rank,
num_tokens, topk and top_indices [num_tokens, topk]. Layers are numbered from 0, those of a decoder
over the whole model by this project's scripts, and in each model chunk by others, whose stages of a
pipeline then look alike; those of multi-token prediction within their depth. Calls with the same
step and layer are micro-batches, and, under recompute, repetitions.

Shape letters: P ranks, E experts, R ranks that traced a layer.
"""

import json
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

_FIELDS = ("step", "block", "layer", "num_tokens", "topk", "top_indices")


@dataclass(frozen=True, kw_only=True, eq=False)
class TracedLayer:
    """One layer of one micro-batch."""

    step: int
    layer: str
    """"decoder 3", "mtp 0.1"."""
    group: int
    """Which of the expert-parallel groups that traced this layer, 0 where there is one."""
    call: int
    """Which of the step's calls, from 0."""
    top_k: int
    counts: np.ndarray
    """int64 [P, E]."""


def read_trace(folder: str | Path, *, num_ranks: int, num_experts: int) -> list[TracedLayer]:
    """Read a folder of trace files, sorted by step, then call, group and layer.

    Ranks 0 .. P-1 are the first expert-parallel group, the next P the second, as Megatron places
    them. With P a multiple of the ranks that traced, each one's tokens are split evenly over P / R
    ranks: what a larger group might have seen.

    Args:
        folder: given to Megatron as `--moe-routing-trace-path`.
        num_ranks: P, divides R or is a multiple of it.
        num_experts: E of the model that was traced, a multiple of P.

    Raises:
        ValueError: nothing there, a line is not a record (its file and number are named), the
            ranks' records do not belong together, or P or E do not fit.
    """
    if num_ranks < 1 or num_experts % num_ranks:
        raise ValueError(f"{num_experts} experts do not divide over {num_ranks} ranks")
    by_call: dict[tuple[int, int, str], dict[int, np.ndarray]] = defaultdict(dict)
    for rank, path in _find_files(Path(folder)):
        calls: dict[tuple[int, str], int] = defaultdict(int)
        for step, layer, choice in _read_file(path, num_experts):
            by_call[step, calls[step, layer], layer][rank] = choice
            calls[step, layer] += 1
    traced: list[TracedLayer] = []
    for (step, call, layer), choices in by_call.items():
        where = f"{folder}: step {step}, {layer}, call {call}"
        for group, counts in enumerate(_group_ranks(choices, num_ranks, num_experts, where)):
            top_k = next(iter(choices.values())).shape[1]
            traced.append(
                TracedLayer(
                    step=step, layer=layer, group=group, call=call, top_k=top_k, counts=counts
                )
            )
    return sorted(traced, key=_place)


def _place(traced: TracedLayer) -> tuple[int, int, int, str, list[int]]:
    """Where a layer comes in the order of all."""
    block, numbers = traced.layer.split()
    order = [int(number) for number in numbers.split(".")]
    return traced.step, traced.call, traced.group, block, order


def _find_files(folder: Path) -> list[tuple[int, Path]]:
    """(rank, file), by rank."""
    found = []
    for path in folder.glob("router_trace_rank*.jsonl"):
        if match := re.fullmatch(r"router_trace_rank(\d+)\.jsonl", path.name):
            found.append((int(match[1]), path))
    if not found:
        raise ValueError(
            f"{folder} has no router_trace_rank*.jsonl: give the folder that a run with "
            "--moe-routing-trace-path wrote"
        )
    return sorted(found)


def _read_file(path: Path, num_experts: int) -> list[tuple[int, str, np.ndarray]]:
    """(step, layer, experts [tokens, K]) of each line."""
    records = []
    with path.open() as lines:
        for number, line in enumerate(lines, 1):
            where = f"{path}, line {number}"
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{where} is not JSON ({error.msg}): was the run cut off? Remove the line"
                ) from error
            if not isinstance(record, dict) or (lacks := [f for f in _FIELDS if f not in record]):
                lack = f"lacks {', '.join(lacks)}" if isinstance(record, dict) else "is no record"
                raise ValueError(f"{where} {lack}: not written by Megatron's router trace")
            shape = (record["num_tokens"], record["topk"])
            choice = np.array(record["top_indices"], dtype=np.int32).reshape(-1, shape[1])
            if choice.shape != shape:
                raise ValueError(f"{where}: top_indices are {list(choice.shape)}, not {shape}")
            if choice.size and not 0 <= choice.min() <= choice.max() < num_experts:
                raise ValueError(
                    f"{where} has expert {choice.max()}, but the model has {num_experts}: give the "
                    "number of experts of the model that was traced"
                )
            layer = f"{record['block']} {record['layer']}"
            if "mtp_idx" in record:
                layer = f"mtp {record['mtp_idx']}.{record['layer']}"
            records.append((record["step"], layer, choice))
    return records


def _group_ranks(
    choices: dict[int, np.ndarray], num_ranks: int, num_experts: int, where: str
) -> list[np.ndarray]:
    """Counts [P, E] of each expert-parallel group from choices [tokens, K] by rank."""
    sources = [choices[rank] for rank in sorted(choices)]
    if num_ranks % len(sources) == 0:
        parts = num_ranks // len(sources)
        sources = [part for source in sources for part in np.array_split(source, parts)]
    elif len(sources) % num_ranks:
        raise ValueError(
            f"{where} was traced by {len(sources)} ranks, which do not form groups of {num_ranks}: "
            f"give a divisor or a multiple of {len(sources)}, or the files of all ranks"
        )
    counts = np.stack([np.bincount(s.ravel(), minlength=num_experts) for s in sources])
    return list(counts.reshape(-1, num_ranks, num_experts).astype(np.int64))
