"""All that a page shows of a recording, in one dict."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_llep.offline.methods import METHODS
from megatron_llep.offline.nodes import Nodes, find_nodes
from megatron_llep.offline.recording import Recording, RecordingInfo
from megatron_llep.offline.report.progress import start_progress
from megatron_llep.offline.view.columns import Columns
from megatron_llep.offline.view.details import RECORDED, keep_details
from megatron_llep.offline.view.drift import encode_drift
from megatron_llep.offline.view.gather import Gathered, gather
from megatron_llep.offline.view.summary import describe_facts, write_summary
from megatron_llep.offline.view.times import choose_rows, predict_times
from megatron_llep.planner.cost.model import CostModel, LayerCost, LayerShape

OBSERVE = "observe"
"""As a recording's planner: plain expert parallelism ran."""
MOST_COLUMNS = 120
DRIFT_COLUMNS = 60
SAMPLED_ROWS = 2400
CELLS, RANKS_OF_CELLS, FEWEST_CELLS = 10_000, 80_000, 2000
"""At most so many cells, times ranks; but with many ranks at least so many cells."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the page assumes, and how much it keeps."""

    cost: CostModel
    nodes: Nodes | None = None
    """None: as recorded."""
    is_assumed: bool = True
    """Whether nobody has named the machine."""
    methods: tuple[str, ...] = METHODS
    shape: LayerShape | None = None
    """Of the MoE layers, instead of what the recording says."""
    shape_from: str = "the recording"
    max_cells: int | None = None


def build_view(recording: Recording, options: Options) -> dict[str, Any]:
    """Sum up a recording, in three passes of which each keeps little."""
    info = recording.info
    shape = options.shape or info.shape
    nodes = options.nodes or find_nodes(None, info.num_ranks, info.ranks_per_node)
    cost = None if shape is None else LayerCost(model=options.cost, shape=shape)
    planned = tuple(m for m in options.methods if m != "auto" or cost is not None)
    lends = info.planner != OBSERVE
    methods = ((RECORDED,) if lends else ()) + tuple(m for m in planned if m != "plain")
    columns, drift_columns = _split_steps(recording, options.max_cells)
    gathered = gather(
        recording, columns, drift_columns, start_progress(recording.num_rows, "reading")
    )
    details = keep_details(
        recording,
        gathered.worst,
        methods,
        nodes.topology,
        cost,
        start_progress(int((gathered.worst >= 0).sum()), "planning the worst"),
    )
    times = None
    if cost is not None:
        sample = choose_rows(recording, MOST_COLUMNS, SAMPLED_ROWS)
        lines = ("plain", *methods)
        bar = start_progress(len(sample.rows), "predicting")
        if len(sample.rows):
            times = predict_times(recording, sample, lines, nodes.topology, cost, bar)
    view: dict[str, Any] = {
        "title": f"Routing of {recording.folder.resolve().name}",
        "ranks": info.num_ranks,
        "experts": info.num_experts,
        "layers": gathered.layers.tolist(),
        "columns": columns.encode(),
        "recorded": info.planner if lends else None,
        "methods": list(methods),
        "cells": _encode_cells(gathered, lends),
        "details": details,
        "times": times,
        "drift": encode_drift(gathered.expert_loads, drift_columns),
    }
    view["summary"] = write_summary(view)
    view["facts"] = describe_facts(recording, view, options, nodes, shape)
    return view


def default_max_cells(info: RecordingInfo) -> int:
    """Few enough that a page stays below some MB."""
    return max(FEWEST_CELLS, min(CELLS, RANKS_OF_CELLS // info.num_ranks))


def _split_steps(recording: Recording, max_cells: int | None) -> tuple[Columns, Columns]:
    """Columns of cells, and of drift."""
    steps, L = recording.steps, len(recording.layers)
    cells = default_max_cells(recording.info) if max_cells is None else max_cells
    most = max(1, min(MOST_COLUMNS, cells // L))
    return Columns.split(steps, most), Columns.split(steps, min(most, DRIFT_COLUMNS))


def _encode_cells(gathered: Gathered, lends: bool) -> dict[str, list[int | float]]:
    """Flat, layer by layer."""
    found: dict[str, np.ndarray] = {
        "rows": gathered.rows,
        "meanBefore": gathered.mean_before,
        "worstBefore": gathered.worst_before,
    }
    if lends:
        found |= {"meanAfter": gathered.mean_after, "worstAfter": gathered.worst_after}
    return {name: values.ravel().round(3).tolist() for name, values in found.items()}
