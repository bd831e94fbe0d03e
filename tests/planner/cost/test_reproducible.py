"""Predictions are the same on every CPU, to the last bit, and so is what `auto` chooses.

Shape letters: P ranks, E experts, M = E / P.
"""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megatron_llep.planner import make_plan
from megatron_llep.planner.cost.model import LayerCost, LayerShape
from megatron_llep.planner.cost.presets import PRESETS
from megatron_llep.planner.plan import plan_from_quota
from megatron_llep.planner.topology import Topology
from planner.planner_routings import REPRODUCIBLE, make_counts

NODES = Topology(ranks_per_node=4)
COST = LayerCost(
    model=PRESETS["h100"],
    shape=LayerShape(hidden=2048, ffn_hidden=1024, num_experts=8, top_k=2, scatter_from=0),
)
TESTS = Path(__file__).parents[2]


@REPRODUCIBLE
@given(
    kind=st.sampled_from(["uniform", "lognormal", "one_source"]),
    M=st.sampled_from([2, 8, 24]),
    planner=st.sampled_from(["exact", "tolerant"]),
    seed=st.integers(0, 99),
)
def test_the_order_of_experts_does_not_matter(kind, M, planner, seed):
    """Sums over experts, and over the ranks of a node, come out the same in any order."""
    P = 8
    counts = make_counts(kind, P, M, seed) * 16
    plan = make_plan(counts, planner=planner, topology=NODES, imbalance_threshold=0.0)
    rng = np.random.default_rng(seed)
    nodes = rng.permutation(P // 4)[:, None] * 4
    ranks = (nodes + np.stack([rng.permutation(4) for _ in nodes])).ravel()
    experts = np.concatenate([rank * M + rng.permutation(M) for rank in ranks])
    renamed = plan_from_quota(plan.quota[experts][:, ranks])
    time = COST.predict(renamed, counts[ranks][:, experts], NODES)
    assert time == COST.predict(plan, counts, NODES)


def digest_predictions() -> str:
    """Of many predictions, and of the plans that `auto` chooses."""
    P, nodes = 32, Topology(ranks_per_node=8)
    found = hashlib.sha256()
    for kind in ("uniform", "lognormal", "one_source"):
        for M in (24, 64):
            for seed in range(10):
                counts = make_counts(kind, P, M, seed) * 16 + np.arange(P)[:, None] % 3
                plan = make_plan(counts, planner="exact", topology=nodes, imbalance_threshold=0.0)
                found.update(repr(COST.predict(plan, counts, nodes)).encode())
                chosen = make_plan(counts, planner="auto", cost=COST, topology=nodes)
                found.update(chosen.quota.tobytes())
    return found.hexdigest()


def test_another_cpu_predicts_the_same():
    """One of an older kind, without the vector instructions of this one."""
    from numpy._core._multiarray_umath import __cpu_dispatch__, __cpu_features__

    older = [name for name in __cpu_dispatch__ if __cpu_features__[name]]
    result = subprocess.run(
        [
            sys.executable,
            "-c",
            "from planner.cost.test_reproducible import digest_predictions as d; print(d())",
        ],
        cwd=TESTS,
        env=os.environ
        | {
            "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path]),
            "OPENBLAS_CORETYPE": "Prescott",  # unknown to other kinds of CPUs, which ignore it
            "NPY_DISABLE_CPU_FEATURES": " ".join(older),
        },
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert result.stdout.split() == [digest_predictions()]
