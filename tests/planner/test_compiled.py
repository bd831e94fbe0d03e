"""Compiled planners: kept for the next process, whoever else compiles, and the same uncompiled."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import megatron_llep

PACKAGE = Path(megatron_llep.__file__).parent

# Prints whether the code is kept, and what a few plans and their assignments come to.
CODE = """
import json, numpy as np
from megatron_llep.planner import compile_planners, make_plan, receives, sends, Topology
from megatron_llep.planner import list_exchange, plan_over_replicas
found = []
for seed in range(3):
    counts = np.random.default_rng(seed).geometric(0.01, (4, 8)) ** (seed + 1)
    counts[:, 0] *= 7
    for planner in ("tolerant", "exact", "lla"):
        plan = make_plan(
            counts, planner=planner, max_foreign=1 + seed % 2, imbalance_threshold=0.0,
            min_tokens_per_gemm=20, topology=Topology(ranks_per_node=2),
        )
        found += [plan.quota.tolist(), plan.transfers.tolist(), plan.digest]
        found += [sends(plan, counts, 1).tolist(), receives(plan, counts, 2).tolist()]
        found += [each.tolist() for each in list_exchange(plan, counts, 3)]
    plan, spread = plan_over_replicas(counts, num_replicas=2, num_ranks=4, planner="exact")
    found += [plan.quota.tolist(), spread.tolist()]
print(json.dumps([compile_planners(), found]))
"""


def start(path: Path | None = None, **variables: str) -> subprocess.Popen:
    environment = os.environ | variables
    if path:
        environment["PYTHONPATH"] = f"{path}:{environment.get('PYTHONPATH', '')}"
    return subprocess.Popen(
        [sys.executable, "-c", CODE], env=environment, stdout=subprocess.PIPE, cwd=path
    )


def finish(process: subprocess.Popen) -> tuple[bool, list]:
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0
    is_cached, found = json.loads(out)
    return is_cached, found


def test_plain_python_makes_the_same_plans():
    assert finish(start(NUMBA_DISABLE_JIT="1"))[1] == finish(start())[1]


@pytest.mark.slow
def test_processes_that_compile_at_once_agree(tmp_path):
    fresh = [start(NUMBA_CACHE_DIR=str(tmp_path)) for _ in range(4)]
    first, *others = map(finish, fresh)
    assert first[0]
    assert all(other == first for other in others)
    assert finish(start(NUMBA_CACHE_DIR=str(tmp_path))) == first


@pytest.mark.slow
def test_without_a_folder_to_write_they_are_compiled_all_the_same(tmp_path):
    # Neither beside the loops nor at home.
    shutil.copytree(PACKAGE, tmp_path / "megatron_llep", ignore=lambda *_: ["__pycache__"])
    (tmp_path / "megatron_llep/planner/loops/__pycache__").touch()
    assert finish(start(tmp_path, HOME="/dev/null")) == (False, finish(start())[1])
