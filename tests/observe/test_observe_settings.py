"""What `--moe-llep-planner observe` takes, and what it refuses of LLEP's own settings."""

from argparse import ArgumentParser
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_llep import LLEPConfig, add_llep_arguments, convert_model, llep_config_from_args
from megatron_llep.integration.compile_once import compile_once_per_host
from megatron_llep.training.arguments import say_what_runs
from megatron_llep.validation import find_all_refusals
from support.layout import Layout, use_layout
from support.ranks import run_ranks
from support.training import Run, build_model, make_config

OBSERVE = LLEPConfig(planner="observe")


@pytest.mark.parametrize(
    ("flag", "settings"),
    [
        ("--moe-llep-replicas expert-dp", {"replicas": "expert-dp"}),
        ("--moe-llep-dispatcher flex", {"dispatcher": "flex"}),
        ("--moe-llep-expert-gemm grouped_mm", {"expert_gemm": "grouped_mm"}),
        ("--moe-llep-tolerance -1", {"tolerance": -1}),
    ],
)
def test_settings_that_would_replace_something_are_refused(flag, settings):
    with pytest.raises(ValueError, match=flag):
        LLEPConfig(planner="observe", **settings)


def test_the_flag():
    parser = add_llep_arguments(ArgumentParser())
    llep = llep_config_from_args(parser.parse_args(["--moe-llep", "--moe-llep-planner", "observe"]))
    assert llep.observes
    assert not llep.replaces
    assert LLEPConfig().replaces
    assert not LLEPConfig(enabled=False).replaces


def test_nothing_of_megatrons_is_refused_or_replaced():
    """Of what LLEP's layers refuse, or run in another way."""
    config: Any = make_config(Run(layout=Layout(ep=2)))
    config.moe_token_dispatcher_type = "allgather"
    config.use_kitchen = True
    config.moe_permute_fusion = True
    assert list(find_all_refusals(config, LLEPConfig())) != []
    assert list(find_all_refusals(config, OBSERVE)) == []
    args: Any = SimpleNamespace(expert_model_parallel_size=2, cuda_graph_modules=["moe_router"])
    what_runs, replaced = say_what_runs(args, OBSERVE)
    assert vars(what_runs) == vars(args)
    assert replaced == []


def test_plans_that_could_not_be_made_are_refused_by_all_ranks():
    """So is a number of ranks that does not fit; no router is watched then."""

    def work(rank: int, size: int) -> None:
        run = Run(layout=Layout(ep=2))
        with use_layout(run.layout):
            chunks = build_model(make_config(run), run)
            for settings, flag in (
                ({"max_foreign_experts": 5}, "--moe-llep-max-foreign-experts 5"),
                ({"ranks_per_node": 3}, "--moe-llep-ranks-per-node 3"),
            ):
                with pytest.raises(ValueError, match=flag):
                    convert_model(chunks, LLEPConfig(planner="observe", **settings))
            assert not any(each._forward_hooks for each in chunks[0].modules())

    run_ranks(work, 2)


def test_all_planners_that_lend_are_compiled_before_training(monkeypatch):
    asked: list[Any] = []

    def work(rank: int, size: int) -> list[Any]:
        monkeypatch.setattr(
            "megatron_llep.integration.compile_once.compile_planners",
            lambda planners, **_: asked.append(tuple(planners)) or True,
        )
        compile_once_per_host(OBSERVE, needed=True)
        return asked

    for each in run_ranks(work, 2):
        assert each == [("tolerant", "exact", "lla", "auto")]
