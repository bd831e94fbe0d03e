"""Where routing is replayed, later layers' counts are gathered at once, and lending is early.

Results are plain Megatron's with the same replay. Ranks agree on what is known, whatever one of
them knows alone.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from megatron.core.transformer.moe.router_replay import RouterReplay

from megatron_llep.ahead.replayed import count_pairs
from megatron_llep.config import LLEPConfig
from megatron_llep.lending.progress import Progress
from megatron_llep.planner import plan_from_quota
from support.host_reads import HostReads
from support.layout import Layout, use_layout
from support.llep import EAGER
from support.ranks import run_ranks
from support.replayed import (
    COUNTS,
    REPLAYING,
    TOKENS,
    WEIGHTS,
    assert_same,
    build,
    build_anew,
    draw_routes,
    let_count_pairs,
    run_forward,
    run_micro_batches,
    set_routes,
)
from support.training import Run

# Not lent in shards, so that each loan is one exchange.
WHOLE = replace(EAGER, scatter_from=0, foreign_weights="keep")
OFF = replace(WHOLE, plan_ahead="off")
LAYERS = 4


def make_run(ep: int = 2, **config) -> Run:
    return Run(layout=Layout(ep=ep), config={"num_layers": LAYERS} | REPLAYING | config)


def test_counts_are_those_of_the_map():
    """Also of tokens that name an expert twice, and in parts that fit a bounded memory."""
    targets = [draw_routes(seed, 50, 3, 16, twice=seed % 2 == 0) for seed in range(5)]
    expected = [torch.zeros(50, 16).scatter(1, each, 1.0).sum(dim=0) for each in targets]
    assert count_pairs(targets, 16).tolist() == torch.stack(expected).tolist()
    assert count_pairs([each[:0] for each in targets], 16).tolist() == [[0] * 16] * 5


def test_as_plain_megatron_with_dense_layers_between_and_experts_named_twice():
    run = make_run(ep=4, num_layers=5, moe_layer_freq=[1, 0, 1, 1, 1])

    def work(rank, size):
        with use_layout(run.layout), pytest.MonkeyPatch.context() as monkeypatch:
            let_count_pairs(monkeypatch)
            plain = run_micro_batches(run, rank, None, 2, twice=True)
            ahead = run_micro_batches(run, rank, WHOLE, 2, twice=True)
            assert_same(ahead, plain)
            assert ahead.ahead == [[False, True, True, True]] * 2
            return ahead.calls

    # All of the second layer's weights travel while the first one runs, and so on.
    first = [TOKENS, WEIGHTS, WEIGHTS, TOKENS, TOKENS]
    between = [TOKENS, WEIGHTS, TOKENS, TOKENS]
    layers = [*first, *between, *between, *[TOKENS] * 3]
    for late, early in run_ranks(work, 4, timeout=120):
        assert late == [COUNTS, COUNTS, *layers], "after the first layer's counts"
        assert early == [COUNTS, COUNTS, *layers], "together with the first layer's"


def list_waits(run: Run, rank: int, llep: LLEPConfig, micro_batches: int) -> list[list[int]]:
    """Of each forward: how often the host has waited when each layer is done."""
    model, planned = build_anew(run, llep)
    done: list[int] = []
    found = []
    for micro_batch in range(micro_batches):
        set_routes(model, rank, 32)
        targets = [each.target_topk_idx for each in RouterReplay.global_router_replay_instances]
        done.clear()
        with HostReads([*model.parameters(), *targets]) as reads:
            hooks = [
                layer.mlp.register_forward_hook(lambda *_, reads=reads: done.append(_count(reads)))
                for layer in model.decoder.layers
            ]
            run_forward(model, run, rank, micro_batch)
        for hook in hooks:
            hook.remove()
        found.append([*done])
    assert all(each.plan.max_foreign for each in planned)
    return found


def _count(reads: HostReads) -> int:
    """Where a kernel places pairs on a GPU, a loop of the host reads them on a CPU."""
    of_llep = [each for each in reads.found if "/megatron_llep/" in each]
    return sum("/placement/tokens.py" not in each for each in of_llep)


def test_host_waits_in_the_first_layer_alone():
    def work(rank, size):
        run = make_run()
        with use_layout(run.layout):
            return [list_waits(run, rank, llep, 2) for llep in (WHOLE, OFF)]

    for ahead, layer_by_layer in run_ranks(work, 2):
        # The own counts and those of later layers, which come together from the second forward on.
        assert ahead == [[2] * LAYERS] * 2
        assert layer_by_layer == [[1, 2, 3, 4]] * 2


def test_ranks_go_as_far_as_all_of_them_know():
    """Micro-batches: all known; up to the third layer on rank 1; nothing there; all again; and one
    in which only layers behind an unknown one are known."""
    run = make_run()

    def leave_out(rank, micro_batch):
        layers = RouterReplay.global_router_replay_instances
        left_out = {1: [layers[2]] * rank, 2: layers * rank, 4: [layers[1]]}
        for each in left_out.get(micro_batch, []):
            each.clear_router_replay_action()

    def work(rank, size):
        def prepare(micro_batch):
            leave_out(rank, micro_batch)

        with use_layout(run.layout):
            plain = run_micro_batches(run, rank, None, 5, prepare=prepare)
            ahead = run_micro_batches(run, rank, WHOLE, 5, prepare=prepare)
            assert_same(ahead, plain)
        return ahead.ahead, [calls.count(COUNTS) for calls in ahead.calls]

    known = [3, 1, 0, 3, 0]
    expected = [[False] + [True] * n + [False] * (3 - n) for n in known]
    # One count for each layer that does not know, and one for all that might.
    counts = [2, 4, 5, 2, 5]
    assert run_ranks(work, 2, timeout=120) == [(expected, counts)] * 2


def test_two_models_do_not_mix():
    """Policy and reference, in turn; one of them has no gradients."""
    run = make_run(num_layers=3)

    def work(rank, size):
        losses = {}
        with use_layout(run.layout):
            for llep in (None, WHOLE):
                policy, planned = build_anew(run, llep)
                reference, of_reference = build(run, llep)
                losses[llep] = []
                for micro_batch in range(3):
                    set_routes(policy, micro_batch + 10 * rank, 32)
                    loss = run_forward(policy, run, rank, micro_batch)
                    with torch.no_grad():
                        losses[llep].append(run_forward(reference, run, rank, 5).item())
                    loss.backward()
                    losses[llep].append(loss.item())
        assert losses[WHOLE] == pytest.approx(losses[None], rel=1e-5)
        for decisions in (planned, of_reference):
            assert [each.ahead is not None for each in decisions] == [False, True, True] * 3
            assert all(each.plan.max_foreign for each in decisions)

    run_ranks(work, 2)


def change_target(layer):
    layer.router.router_replay.target_topk_idx = layer.router.router_replay.target_topk_idx.clone()


def change_action(layer):
    layer.router.router_replay.clear_router_replay_action()


def write_to_target(layer):
    layer.router.router_replay.target_topk_idx.add_(0)


@pytest.mark.parametrize("change", [change_target, change_action, write_to_target])
def test_a_replay_that_changes_within_a_forward_is_refused(change):
    def work(rank, size):
        run = make_run(num_layers=2)
        with use_layout(run.layout):
            model, _ = build_anew(run, WHOLE)
            set_routes(model, rank, 32)
            first, second = (layer.mlp for layer in model.decoder.layers)
            memory = first.shared_lending.memory
            with torch.no_grad():
                first.token_dispatcher.on_plan.append(lambda _: change(second))
                with pytest.raises(RuntimeError, match="plan-ahead off"):
                    run_forward(model, run, rank, 0)
                first.token_dispatcher.on_plan.clear()
                held = memory.alive
                # The next forward lets go of what was lent to the second layer.
                set_routes(model, rank, 32)
                run_forward(model, run, rank, 0)
                assert memory.alive == 0
            return held

    assert any(run_ranks(work, 2)), "nothing was on its way to the second layer"


def test_a_map_that_was_not_foretold_is_told_to_all_ranks():
    """Written to behind the back of torch's version counter, on one rank."""

    def work(rank, size):
        run = make_run(num_layers=2)
        with use_layout(run.layout):
            model, _ = build_anew(run, WHOLE)
            set_routes(model, rank, 32)
            first, second = (layer.mlp for layer in model.decoder.layers)

            def write(_):
                target = second.router.router_replay.target_topk_idx.data
                target[:] = target.flip(0).roll(1, dims=1) if rank == 0 else (target + 1) % 8

            with torch.no_grad():
                run_forward(model, run, rank, 0)  # from now on all count before the first plan
                first.token_dispatcher.on_plan.append(write)
                run_forward(model, run, rank, 1)
                first.token_dispatcher.on_plan.clear()
                with pytest.raises(RuntimeError, match=r"on ranks \[1\] a router"):
                    run_forward(model, run, rank, 2)

    run_ranks(work, 2)


def test_ranks_in_different_forwards_say_so():
    """One recomputes while the other begins anew, and gathers what the first one does not."""
    recompute = {"recompute_granularity": "full", "recompute_method": "uniform"}
    run = make_run(num_layers=2, recompute_num_layers=1, **recompute)

    kept = []

    def work(rank, size):
        # Left in use: gloo cannot end a group in which a gather waits for the other rank.
        kept.append(use_layout(run.layout))
        kept[0].__enter__()
        model, _ = build_anew(run, WHOLE)
        losses = []
        for micro_batch in range(2):
            set_routes(model, micro_batch + rank, 32)
            losses.append(run_forward(model, run, rank, micro_batch))
        with pytest.raises(RuntimeError, match="different forwards") as caught:
            losses[1].backward() if rank == 0 else run_forward(model, run, rank, 2)
        return str(caught.value)

    first, second = run_ranks(work, 2)
    assert first == second
    assert "ranks [0]: layer 2, training, recomputed" in first


def test_the_digest_stands_for_all_plans_since_the_last_count():
    one, other = (plan_from_quota(np.diag([1, number])) for number in (1, 2))
    made = []
    for plans in ([one, one], [other, one], [one, other], [one]):
        progress = Progress()
        progress.note_plan(other)
        progress.note_plan(plans[0])
        for plan in plans[1:]:
            progress.note_plan(plan, ahead_of="layer 2")
        made.append(progress.last_plan)
    assert len(set(made)) == len(made)
    assert made[-1] == one.digest
    assert all(-(2**63) <= each < 2**63 for each in made)


def patch_replay(monkeypatch, model):
    def get_topk(self, scores, topk, *others):
        return scores.topk(topk)

    monkeypatch.setattr(RouterReplay, "get_replay_topk", get_topk)


def hook_router(monkeypatch, model):
    model.decoder.layers[1].mlp.router.register_forward_hook(lambda *_: None)


def give_too_few_routes(monkeypatch, model):
    model.decoder.layers[1].mlp.router.router_replay.target_topk_idx = torch.zeros(31, 2).long()
    monkeypatch.setattr(RouterReplay, "get_replay_topk", lambda self, scores, k, *_: scores.topk(k))


@pytest.mark.parametrize("change", [patch_replay, hook_router, give_too_few_routes])
def test_routers_that_may_choose_otherwise_count_for_themselves(change):
    def work(rank, size):
        run = make_run(num_layers=2)
        with use_layout(run.layout), pytest.MonkeyPatch.context() as monkeypatch:
            model, planned = build_anew(run, WHOLE)
            set_routes(model, rank, 32)
            if rank == 1:
                change(monkeypatch, model)
            run_forward(model, run, rank, 0)
        return [each.ahead for each in planned]

    assert run_ranks(work, 2) == [[None, None]] * 2
