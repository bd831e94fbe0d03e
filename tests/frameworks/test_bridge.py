"""Megatron-Bridge: its own `pretrain`, with the snippets of docs/frameworks.md."""

from typing import Any

import pytest
from bridge_runs import STEPS, BridgeRun, make_config, make_provider, run_bridge
from framework_doc import get_blocks

from megatron_llep.metrics import METRICS, PREFIX
from support.ranks import run_ranks

SNIPPET, HOOK = get_blocks("Megatron-Bridge", "python")
EAGER = {"planner": "exact", "imbalance_threshold": 1.0}


def start_plain(pretrain: Any, config: Any, forward_step: Any) -> None:
    pretrain(config, forward_step)


def start_documented(pretrain: Any, config: Any, forward_step: Any) -> None:
    config.llep = EAGER
    exec(SNIPPET, {"pretrain": pretrain, "config": config, "forward_step": forward_step})


def start_by_hook(pretrain: Any, config: Any, forward_step: Any) -> None:
    exec(HOOK, {"provider": config.model})
    pretrain(config, forward_step)


def train(rank: int, size: int, folder: Any) -> dict[str, BridgeRun]:
    starts = {"plain": start_plain, "documented": start_documented, "hook": start_by_hook}
    return {
        name: run_bridge(make_config(folder / name, make_provider()), start)
        for name, start in starts.items()
    }


def test_pretrain_is_that_of_bridge(tmp_path):
    first, last = run_ranks(train, 2, tmp_path, timeout=600)
    plain = first["plain"].losses
    assert len(plain) == STEPS
    for rank in (first, last):
        for name in ("documented", "hook"):
            assert rank[name].losses == pytest.approx(plain, rel=1e-5)
    for metric in METRICS:
        assert len(last["documented"].logged[PREFIX + metric.name]) == STEPS
        assert f"{PREFIX}{metric.name}: " in first["documented"].printed
    assert last["documented"].lent > 0
    assert last["hook"].lent > 0
    assert not any(name.startswith(PREFIX) for name in last["plain"].logged)
