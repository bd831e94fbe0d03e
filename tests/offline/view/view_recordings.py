"""Recordings whose pages are known beforehand."""

import numpy as np

from megatron_llep.offline.recording import RecordedLayer, RecordingInfo, RecordingWriter
from megatron_llep.offline.recording.layout import list_loans
from megatron_llep.planner import make_plan

P, E = 4, 16
LAYERS = (1, 3)
STEPS = 10
MODEL = {"hidden": 512, "ffn_hidden": 1024}
HOT_LAYER, HOT_STEP, HOT_BATCH, HOT_EXPERT, HOME = 3, 7, 1, 9, 2


def make_info(**changes):
    sizes = {"num_ranks": P, "num_experts": E, "top_k": 2, "num_layers": 4}
    return RecordingInfo(**({"planner": "tolerant", "model": MODEL} | sizes | changes))


def write_rows(folder, rows, info=None):
    writer = RecordingWriter(folder, info or make_info(), "all")
    for row in rows:
        writer.add(row)
    writer.close()
    return folder


def make_row(counts, *, step=0, layer=0, micro_batch=0, group=0, planner="tolerant"):
    lent = np.zeros((0, 3), np.int64)
    if planner is not None:
        lent = list_loans(make_plan(counts, planner=planner))
    return RecordedLayer(
        step=step, micro_batch=micro_batch, layer=layer, group=group, counts=counts, lent=lent
    )


def hot_counts():
    """Of the one layer of a micro-batch that is not balanced."""
    counts = np.full((P, E), 50, np.int64)
    counts[:, HOT_EXPERT] += 1000
    return counts


def write_planted(folder, *, planner="tolerant", **changes):
    """All is balanced but for one layer of one micro-batch, where one expert is hot."""
    rows = []
    for step in range(STEPS):
        for micro_batch in (0, 1):
            for layer in LAYERS:
                hot = (step, micro_batch, layer) == (HOT_STEP, HOT_BATCH, HOT_LAYER)
                counts = hot_counts() if hot else np.full((P, E), 50, np.int64)
                rows.append(
                    make_row(
                        counts,
                        step=step,
                        layer=layer,
                        micro_batch=micro_batch,
                        planner=None if planner == "observe" else planner,
                    )
                )
    return write_rows(folder, rows, make_info(planner=planner, **changes))


def make_random_rows(*, steps=6, layers=LAYERS, batches=2, groups=2, seed=0):
    rng = np.random.default_rng(seed)
    return [
        make_row(
            rng.integers(0, 900, (P, E)) * (rng.random(E) < 0.6),
            step=step,
            layer=layer,
            micro_batch=batch,
            group=group,
        )
        for step in range(steps)
        for batch in range(batches)
        for group in range(groups)
        for layer in layers
    ]
