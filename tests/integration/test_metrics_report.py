"""What Megatron's tracker reports of LLEP, of all ranks and layers, in its log and per layer."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from megatron.core import parallel_state

from megatron_llep.metrics import METRICS, PREFIX, install_tracker, record_exchange, record_plan
from megatron_llep.planner import make_plan
from support.layout import Layout, use_layout
from support.metrics import Scalars, report
from support.ranks import run_ranks

MIB = 2**20
CONFIG: Any = SimpleNamespace(num_layers=6)
COUNTS = np.array([[30, 10], [10, 10]])
"""40 tokens for the expert of rank 0, 20 for that of rank 1."""


def record(rank: int, layer_number: int, *, is_mtp_layer: bool = False) -> None:
    """Two micro-batches of a layer. Rank r holds up to 2 (r + 1) MiB and sends 3 (r + 1) in all."""
    plan = make_plan(COUNTS, planner="exact", imbalance_threshold=1.0, min_tokens_per_gemm=1)
    where = {"layer_number": layer_number, "is_mtp_layer": is_mtp_layer, "config": CONFIG}
    group = parallel_state.get_expert_model_parallel_group()
    for micro_batch in (2, 1):
        record_plan(
            plan,
            COUNTS.sum(axis=0),
            expert_bytes=MIB,
            foreign_bytes=micro_batch * (rank + 1) * MIB,
            plan_seconds=(rank + 1) * 1e-3,
            **where,
        )
        record_exchange(micro_batch * (rank + 1) * MIB, MIB // 2, group=group, **where)


def read(scalars: Scalars, name: str) -> dict[int, float]:
    """A metric of each layer."""
    prefix = f"{PREFIX}{name}_layer_"
    return {int(key.removeprefix(prefix)): scalars[key] for key in scalars if prefix in key}


@pytest.mark.parametrize(
    "told",
    [
        {"num_layers": None},
        # Of a hybrid model: how many layers have experts.
        {"num_layers": 2, "moe_layer_freq": 1, "mtp_num_layers": 1, "force_initialize": True},
        {"num_layers": 6, "moe_layer_freq": 1, "mtp_num_layers": 1, "force_initialize": True},
    ],
    ids=["no number", "hybrid", "all layers"],
)
def test_layers_of_all_stages(told):
    """They keep their number in the model, whatever Megatron says of how many there are."""

    def work(rank, size):
        with use_layout(Layout(pp=2, ep=2)):
            install_tracker()
            if rank < 2:
                record(rank, 2)
            else:
                record(rank, 5)
                record(rank, 1, is_mtp_layer=True)
            line, scalars = report(**told)
            assert report(**told) == ("", {})  # nothing is left
        assert len(scalars) == len(METRICS) * (1 + 3)
        assert read(scalars, "overload_factor_before") == pytest.approx(
            {1: 4 / 3, 4: 4 / 3, 6: 4 / 3}
        )
        assert read(scalars, "lent_mib") == {1: 1, 4: 1, 6: 1}
        assert read(scalars, "foreign_mib") == {1: 4, 4: 8, 6: 8}
        assert read(scalars, "lent_link_mib") == {1: 3, 4: 6, 6: 6}
        assert read(scalars, "plan_ms") == pytest.approx({1: 1.5, 4: 3.5, 6: 3.5})
        assert scalars[PREFIX + "foreign_mib"] == 8
        assert scalars[PREFIX + "lent_experts"] == 3
        return line

    lines = run_ranks(work, 4)
    assert len(set(lines)) == 1
    assert " foreign_mib: 8.00 |" in lines[0]
    assert " lent_link_mib: 15.00 |" in lines[0]


def test_a_stage_without_experts():
    def work(rank, size):
        with use_layout(Layout(pp=2, ep=2)):
            install_tracker()
            assert report(num_layers=6) == ("", {})
            if rank >= 2:
                record(rank, 6)
            return report(num_layers=6)[1]

    for scalars in run_ranks(work, 4):
        assert read(scalars, "foreign_mib") == {5: 8}


@pytest.mark.parametrize("layout", [Layout(ep=2, dp=4), Layout(tp=2, ep=2, etp=1, dp=2)], ids=str)
def test_ranks_that_share_tokens_and_others(layout):
    """Two groups of two: the busiest of each, on average; the most memory of all."""

    def work(rank, size):
        with use_layout(layout):
            install_tracker()
            record(rank, 1)
            return report(num_layers=6)[1]

    for scalars in run_ranks(work, 4):
        assert read(scalars, "lent_link_mib") == {0: (3 + 6) / 2}
        assert read(scalars, "foreign_mib") == {0: 8}
        assert read(scalars, "plan_ms") == pytest.approx({0: 2.5})
        assert read(scalars, "max_tokens_before") == {0: 40}
        assert read(scalars, "max_tokens_after") == {0: 30}
