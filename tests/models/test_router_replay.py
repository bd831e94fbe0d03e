"""Megatron's router replay: a routing that is given from outside is obeyed.

Frameworks that replay a rollout's routing patch Megatron for it: verl lets the dispatcher count
pairs, as a token may name an expert twice, and NeMo-RL lets the router choose where a rollout has
left a token's routes out.

Shape letters: T = tokens of this rank, K = experts per token, L = layers.
"""

import pytest
import torch
from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

from megatron_llep.integration.convert import convert_model
from megatron_llep.placement.forward import Planned
from support.comparison import get_relative_difference
from support.layout import Layout, use_layout
from support.llep import EAGER, note_decisions
from support.ranks import run_ranks
from support.training import Run, build_model, make_config, make_tokens

RECOMPUTES = {
    "none": {},
    "moe": {"recompute_granularity": "selective", "recompute_modules": ["moe"]},
    "full": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
}


def replay(run: Run, rank: int, target: list[torch.Tensor] | None, llep=None):
    """One step; record the routing if no `target` [T, K] a layer is given, else replay it.

    Returns:
        The loss and all gradients, the recorded routing, and LLEP's decisions.
    """
    RouterReplay.clear_global_router_replay_instances()
    decisions: list[Planned] = []
    with use_layout(run.layout):
        (model,) = build_model(make_config(run), run)
        if llep is not None:
            note_decisions(convert_model([model], llep), decisions)
        if target is None:
            RouterReplay.set_global_router_replay_action(RouterReplayAction.RECORD)
        else:
            RouterReplay.set_replay_data(target)
            RouterReplay.set_global_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
        tokens = make_tokens(run, 0, rank)
        inputs, labels = tokens[:, :-1], tokens[:, 1:]
        positions = torch.arange(inputs.shape[1]).expand_as(inputs)
        loss = model(inputs, positions, None, labels=labels).mean()
        recorded = RouterReplay.get_recorded_data()
        if target is not None:
            RouterReplay.set_global_router_replay_action(RouterReplayAction.REPLAY_BACKWARD)
        loss.backward()
        results = [loss.detach()] + [
            torch.zeros_like(weight) if weight.grad is None else weight.grad
            for weight in model.parameters()
        ]
        return results, recorded, decisions


def assert_close(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for mine, other in zip(actual, expected, strict=True):
        assert get_relative_difference(mine, other) <= 1e-5


@pytest.mark.parametrize("recompute", RECOMPUTES)
def test_recorded_and_forced_routing(recompute):
    run = Run(
        layout=Layout(ep=2),
        config={"moe_enable_routing_replay": True} | RECOMPUTES[recompute],
    )

    def work(rank, size):
        natural, recorded, _ = replay(run, rank, None)
        assert_close(replay(run, rank, recorded, EAGER)[0], natural)

        # Another routing than the router's own: almost all tokens to the first rank's experts.
        forced = [indices % 4 for indices in recorded]
        for indices in forced:  # a token's experts differ
            indices[:, 1] = (indices[:, 0] + 1 + indices[:, 1] % 3) % 4
        plain, _, _ = replay(run, rank, forced)
        lending, _, decisions = replay(run, rank, forced, EAGER)
        assert_close(lending, plain)
        assert get_relative_difference(plain[0], natural[0]) > 1e-3
        passes = 1 if recompute == "none" else 2
        assert len(decisions) == passes * len(forced)
        for decision, indices in zip(decisions, forced, strict=False):  # forward comes first
            assert len(decision.plan.transfers) > 0
            expected = indices.flatten().bincount(minlength=8)
            assert decision.counts[rank].tolist() == expected.tolist()

    run_ranks(work, 2)


def count_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """As verl patches the dispatcher: a token with an expert twice has fewer than K pairs."""
    preprocess = MoEAlltoAllTokenDispatcher.preprocess

    def count(self, routing_map):
        result = preprocess(self, routing_map)
        self.num_out_tokens = int(routing_map.sum())
        return result

    monkeypatch.setattr(MoEAlltoAllTokenDispatcher, "preprocess", count)


def choose_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As NeMo-RL patches the replay: the router chooses for tokens whose routes are all -1."""

    def get_topk(self, scores, topk, num_groups=None, group_topk=None, default_compute_topk=None):
        _, natural = default_compute_topk(scores, topk, num_groups, group_topk)
        if self.router_replay_action == RouterReplayAction.RECORD:
            self.record_indices(natural)
        if self.router_replay_action == RouterReplayAction.REPLAY_FORWARD:
            missing = (self.target_topk_idx < 0).all(dim=1, keepdim=True)
            natural = torch.where(missing, natural, self.target_topk_idx)
            self.replay_backward_list[-1] = natural
        if self.router_replay_action == RouterReplayAction.REPLAY_BACKWARD:
            natural = self.replay_backward_list.pop(0)
        return scores.gather(1, natural), natural

    monkeypatch.setattr(RouterReplay, "get_replay_topk", get_topk)


def test_routes_of_a_rollout_that_name_an_expert_twice_or_none():
    def work(rank, size):
        with pytest.MonkeyPatch.context() as monkeypatch:
            count_pairs(monkeypatch)
            choose_what_is_missing(monkeypatch)
            target = None
            for recompute in RECOMPUTES.values():
                config = {"moe_enable_routing_replay": True} | recompute
                run = Run(layout=Layout(ep=2), config=config)
                if target is None:
                    _, recorded, _ = replay(run, rank, None)
                    target = [indices % 4 for indices in recorded]
                    for indices in target:
                        indices[::2, 1] = indices[::2, 0]
                        indices[::5] = -1
                plain, _, _ = replay(run, rank, target)
                lending, _, decisions = replay(run, rank, target, EAGER)
                assert_close(lending, plain)
                assert all(len(decision.plan.transfers) > 0 for decision in decisions)
                for decision, indices in zip(decisions, target, strict=False):
                    assert decision.counts[rank].sum() < indices.numel()

    run_ranks(work, 2)
