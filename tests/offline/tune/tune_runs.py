"""Recordings of planted routing, and what replays them."""

import numpy as np

from megatron_llep.offline.recording import RecordedLayer, RecordingInfo, RecordingWriter
from megatron_llep.offline.workloads import make_counts
from megatron_llep.planner.cost.model import LayerShape
from megatron_llep.planner.cost.presets import PRESETS

P, E, K = 4, 16, 2
SHAPE = LayerShape(hidden=4096, ffn_hidden=2048, num_experts=E, top_k=K)
MODEL = {"hidden": 4096, "ffn_hidden": 2048}
H200 = PRESETS["h200"]


def route(workload, *, layer=0, step=0, tokens=8192, ranks=P, experts=E):
    return make_counts(
        workload,
        num_ranks=ranks,
        num_experts=experts,
        tokens_per_rank=tokens,
        top_k=K,
        seed=layer,
        step=step,
    )


def record(folder, workloads, *, layers=2, steps=6, groups=1, tokens=8192, experts=E, **info):
    """A run whose layers are routed as `workloads` say in turn; its counts by step, then layer."""
    info = {"num_layers": layers, "planner": "exact", "model": MODEL} | info
    written = RecordingInfo(num_ranks=P, num_experts=experts, top_k=K, **info)
    writer = RecordingWriter(folder, written, "a")
    counts = []
    for step in range(steps):
        for group in range(groups):
            for layer in range(layers):
                workload = workloads[layer % len(workloads)]
                sizes = {"tokens": tokens, "experts": experts}
                counts.append(route(workload, layer=layer + 9 * group, step=step, **sizes))
                writer.add(
                    RecordedLayer(
                        step=step,
                        micro_batch=0,
                        layer=layer,
                        group=group,
                        counts=counts[-1],
                        lent=np.zeros((0, 3), np.int64),
                    )
                )
    writer.close()
    return counts
