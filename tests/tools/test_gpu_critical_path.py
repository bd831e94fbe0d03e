"""The critical path of tools/gpu_check.py: the ranks it runs, and the layers it times."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_llep.offline.one_rank import be_one_rank
from megatron_llep.offline.simulator.models import MODELS
from megatron_llep.planner import make_plan
from support.one_rank import be_alone
from support.ranks import run_ranks

ROOT = Path(__file__).resolve().parents[2]
sys.path.extend([str(ROOT / "tools"), str(ROOT)])

from gpu_check import build_parser, make_path_job  # noqa: E402
from gpu_checks.critical_path import choose_ranks, make_case, make_row, shrink  # noqa: E402
from gpu_checks.demands import PLAIN, Pass  # noqa: E402


def run_layers(be_a_rank):
    """What both layers of rank 3 of 8 do under log-normal routing."""
    from gpu_checks.layer_run import RankLayers

    model = shrink(MODELS["gpt-oss-120b"])
    found = []
    with be_a_rank(3, 8):
        layers = RankLayers(model, "grouped_mm", 3, 8)
        case = make_case(model, "lognormal-1", PLAIN)
        layers.route(case.counts)
        seen = []
        experts = layers._plain.experts
        experts.register_forward_hook(lambda _, args, out: seen.append(args[1].tolist()))
        for method in (PLAIN, "tolerant", PLAIN):
            one = layers.run(method)
            busy = layers.find_busy_seconds(method)
            found.append((method, one, layers.lent, seen[-1], busy))
        main_grads = [parameter.main_grad for parameter in experts.parameters()]
        assert sum(grad.abs().sum() for grad in main_grads) > 0
        assert all(parameter.grad is None for parameter in experts.parameters())
    return case.plan.quota[12:16, 3].tolist(), found


def test_both_layers_run_on_the_same_experts():
    """Each expert gets the tokens that all ranks' counts say, though the others are not there."""

    ((tokens, found),) = run_ranks(lambda *_: run_layers(be_alone), 1)
    for method, one, lent, seen, busy in found:
        assert one.layer_seconds > one.forward_seconds > one.host_seconds > 0
        assert (lent > 0) == (method == "tolerant")
        assert seen == tokens or method != PLAIN
        assert busy is None


def test_what_overlaps_on_the_device_counts_once():
    from gpu_checks.layer_run import add_up

    assert add_up([(5, 6), (0, 2), (1, 3), (1, 2)]) == 4


def test_the_ranks_that_could_be_slowest_are_run():
    # Experts 0 and 1 at home on rank 0, 2 and 3 on rank 1, and so on.
    loads = np.array([20, 0, 11, 10, 20, 2, 9, 0])
    counts = np.tile(loads, (4, 1)) * 100
    plain = make_plan(counts, planner="exact", max_foreign=0)
    assert choose_ranks(plain) == [1, 2], "most pairs, most experts; nothing is lent"
    lending = make_plan(np.diag([8000, 0, 0, 0]).repeat(2, axis=1), planner="exact")
    assert choose_ranks(lending)[0] == 0, "most transfers"


def test_the_paper_grid_is_that_of_the_paper():
    """95% of all pairs go into expert 0, and a planner's worst rank has an eighth of them."""
    model = MODELS["gpt-oss-120b"]
    plain, lending = (make_case(model, "hot-95-1", method) for method in ("plain", "exact"))
    assert plain.counts.sum() == 8 * 32768 * model.layer.top_k
    assert plain.counts[:, 0].sum() == pytest.approx(0.95 * plain.counts.sum(), rel=1e-3)
    assert plain.plan.is_fallback
    assert lending.plan.load_per_rank_after.max() == np.ceil(lending.counts.sum() / 8)


def test_a_row_is_that_of_the_slowest_rank():
    job = make_path_job(build_parser().parse_args([]))
    model = job.models[0]
    case = make_case(model, "hot-95-1", "tolerant")
    quick = Pass(
        layer_seconds=1, forward_seconds=0.5, host_seconds=0.1, idle_seconds=0, peak_bytes=7
    )
    slow = replace(quick, layer_seconds=2, peak_bytes=5)
    case.passes.update({0: quick, 3: slow, 5: quick})
    row = make_row(job, model, job.kinds[0], case)
    assert (row.rank, row.layer_seconds) == (3, 2)
    assert row.peak_bytes == 7, "the most memory of any rank"


@pytest.mark.gpu
def test_a_gpu_is_seen_to_work():
    _, found = run_layers(be_one_rank)
    for method, one, _, _, busy in found:
        assert one.peak_bytes > 0
        assert (one.host_seconds is None) == (method == PLAIN)
        assert busy is None or 0 < busy < 10
