"""Predicted time of steps under each method, from a bounded number of layers.

Shape letters: L MoE layers, T steps that are predicted.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_llep.offline.methods import plan_method
from megatron_llep.offline.recording import RecordedLayer, Recording
from megatron_llep.offline.view.details import RECORDED
from megatron_llep.planner import Topology
from megatron_llep.planner.cost.across import count_node_bytes
from megatron_llep.planner.cost.model import LayerCost

OTHER = "other_flops_per_token"
"""In a recording's model: FLOPs of a token, forward, in all that is no MoE layer's experts."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Sample:
    """Rows that stand for steps."""

    steps: np.ndarray
    """[T] evenly chosen."""
    rows: np.ndarray
    """Numbers of the recording's rows: some micro-batches of these steps, through all layers."""
    batches: dict[int, float]
    """Of each step: micro-batches it has / micro-batches that were chosen."""


def choose_rows(recording: Recording, most_steps: int, most_rows: int) -> Sample:
    """Choose evenly: steps first, then micro-batches of these and groups.

    At least one micro-batch is chosen, even if its layers are more than `most_rows`. Those that
    lack a layer are left out: of a run that was killed some ranks may have written less.
    """
    steps, L = recording.steps, len(recording.layers)
    T = max(1, min(len(steps), most_steps, most_rows // L))
    chosen = steps[np.unique(np.linspace(0, len(steps) - 1, T).round().astype(int))]
    each = max(1, most_rows // (L * len(chosen)))
    rows, batches = [], {}
    for number, step in enumerate(chosen.tolist()):
        first, last = np.searchsorted(recording.places[:, 0], [step, step + 1])
        of_step = recording.places[first:last][:, [1, 3]]
        unique, which, sizes = np.unique(of_step, axis=0, return_inverse=True, return_counts=True)
        whole = np.flatnonzero(sizes == L)
        if not len(whole):
            continue
        # Begin elsewhere in each step, so that not always the same micro-batch is asked.
        picks = np.linspace(0, len(whole), min(each, len(whole)), endpoint=False).astype(int)
        picks = whole[(picks + number) % len(whole)]
        rows.append(first + np.flatnonzero(np.isin(which.ravel(), picks)))
        batches[step] = len(np.unique(unique[:, 0])) / len(picks)
    return Sample(
        steps=np.array(list(batches), int),
        rows=np.concatenate(rows) if rows else np.zeros(0, int),
        batches=batches,
    )


def predict_times(
    recording: Recording,
    sample: Sample,
    methods: Sequence[str],
    topology: Topology,
    cost: LayerCost,
    on_row: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Predict the sample's steps: all layers one after another, micro-batch by micro-batch.

    Args:
        recording: what the sample is of.
        sample: of `choose_rows`.
        methods: of `METHODS`, and `RECORDED`.
        topology: of the ranks.
        cost: the machine and the layer.
        on_row: called after each row, for a progress bar.

    Returns:
        For the page: `steps`, and `lines` of microseconds by method; `whole` says whether they are
        of the whole model, rather than of its MoE layers; `across` is by method what crosses
        between nodes in a layer of a micro-batch, and what of it the link carries that is busiest
        in each exchange: bytes, means. It is empty where all ranks are on one node.
    """
    other = recording.info.model.get(OTHER)
    at = {step: number for number, step in enumerate(sample.steps.tolist())}
    seconds = {method: np.zeros(len(at)) for method in methods}
    layers = len(recording.layers)
    several = topology.node_size(recording.info.num_ranks) < recording.info.num_ranks
    across = {method: np.zeros(2) for method in methods if several}
    for row in recording.read(sample.rows):
        extra = 0.0
        if other is not None:  # once a micro-batch, so a part of it in each of its layers
            extra = _predict_other(row, other, cost) / layers
        for method in methods:
            plan = (
                row.plan if method == RECORDED else plan_method(row.counts, method, topology, cost)
            )
            time = cost.predict(plan, row.counts, topology).total + extra
            seconds[method][at[row.step]] += time * sample.batches[row.step]
            if several:
                sent = count_node_bytes(plan, row.counts, cost.shape, topology)
                across[method] += np.array([sent.total, sent.busiest]) / len(sample.rows)
        on_row()
    return {
        "steps": sample.steps.tolist(),
        "lines": {m: np.rint(times * 1e6).astype(int).tolist() for m, times in seconds.items()},
        "whole": other is not None,
        "rows": len(sample.rows),
        "across": {m: np.rint(numbers).astype(int).tolist() for m, numbers in across.items()},
    }


def _predict_other(row: RecordedLayer, flops_per_token: float, cost: LayerCost) -> float:
    """Seconds of the rest of the model on the rank that has most tokens, forward and backward."""
    tokens = int(row.counts.sum(axis=1).max()) / cost.shape.top_k
    forward = tokens * flops_per_token / cost.model.flops_per_second
    return forward * (1 + cost.model.backward_factor)
