"""LLEPConfig and its flags: defaults, help, and what is refused."""

import argparse
import dataclasses
import math

import pytest

from megatron_llep.config import LLEPConfig, flag_of
from megatron_llep.integration.arguments import add_llep_arguments, llep_config_from_args

FLAGS = [
    "--moe-llep",
    "--moe-llep-planner",
    "--moe-llep-tolerance",
    "--moe-llep-capacity-factor",
    "--moe-llep-min-tokens-per-gemm",
    "--moe-llep-imbalance-threshold",
    "--moe-llep-cost-model",
    "--moe-llep-replicas",
    "--moe-llep-max-foreign-experts",
    "--moe-llep-ranks-per-node",
    "--moe-llep-lend-to",
    "--moe-llep-token-assignment",
    "--moe-llep-dispatcher",
    "--moe-llep-foreign-weights",
    "--moe-llep-grad-dtype",
    "--moe-llep-plan-ahead",
    "--moe-llep-expert-gemm",
    "--moe-llep-scatter-from",
    "--moe-llep-record",
]


def parse(*words: str) -> LLEPConfig:
    parser = add_llep_arguments(argparse.ArgumentParser())
    return llep_config_from_args(parser.parse_args(words))


def test_the_flags_and_their_help():
    parser = add_llep_arguments(argparse.ArgumentParser())
    actions = {action.option_strings[0]: action for action in parser._actions}
    assert list(actions)[1:] == FLAGS
    assert [flag_of(field.name) for field in dataclasses.fields(LLEPConfig)] == FLAGS
    for flag in FLAGS:
        assert (actions[flag].help or "").endswith("."), f"{flag} has no help"


def test_off_unless_asked_for_on_the_command_line_on_in_python():
    assert parse() == LLEPConfig(enabled=False)
    assert parse("--moe-llep") == LLEPConfig()


def test_every_flag_is_read():
    given = parse(
        *("--moe-llep", "--moe-llep-planner", "lla", "--moe-llep-capacity-factor", "1.5"),
        *("--moe-llep-min-tokens-per-gemm", "7", "--moe-llep-imbalance-threshold", "2"),
        *("--moe-llep-tolerance", "0.2", "--moe-llep-ranks-per-node", "4"),
        *("--moe-llep-lend-to", "own_node", "--moe-llep-dispatcher", "flex"),
        *("--moe-llep-max-foreign-experts", "3", "--moe-llep-token-assignment", "rank_order"),
        *("--moe-llep-foreign-weights", "refetch", "--moe-llep-grad-dtype", "param"),
        *("--moe-llep-replicas", "expert-dp", "--moe-llep-expert-gemm", "grouped_mm"),
        *("--moe-llep-scatter-from", "2", "--moe-llep-record", "here"),
        *("--moe-llep-plan-ahead", "off"),
    )
    assert given == LLEPConfig(
        planner="lla",
        capacity_factor=1.5,
        min_tokens_per_gemm=7,
        imbalance_threshold=2.0,
        replicas="expert-dp",
        max_foreign_experts=3,
        plan_ahead="off",
        tolerance=0.2,
        ranks_per_node=4,
        lend_to="own_node",
        token_assignment="rank_order",
        dispatcher="flex",
        foreign_weights="refetch",
        grad_dtype="param",
        expert_gemm="grouped_mm",
        scatter_from=2,
        record="here",
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("planner", "magic"),
        ("planner", "lp"),  # without replicas
        ("replicas", "all"),
        ("token_assignment", "random"),
        ("dispatcher", "allgather"),
        ("foreign_weights", "borrow"),
        ("grad_dtype", "fp8"),
        ("expert_gemm", "cutlass"),
        ("tolerance", -0.1),
        ("tolerance", math.nan),
        ("ranks_per_node", 0),
        ("lend_to", "nobody"),
        ("capacity_factor", 0.99),
        ("capacity_factor", math.nan),
        ("capacity_factor", math.inf),
        ("min_tokens_per_gemm", -1),
        ("imbalance_threshold", -0.5),
        ("imbalance_threshold", math.nan),
        ("max_foreign_experts", -1),
        ("scatter_from", -1),
        ("scatter_from", 1),
        ("record", ""),
    ],
)
def test_bad_values_name_flag_value_and_remedy(field, value):
    with pytest.raises(ValueError, match=r"give|choose") as error:
        LLEPConfig(**{field: value})
    assert str(error.value).startswith(f"{flag_of(field)} {value}: ")
    with pytest.raises(ValueError, match=flag_of(field)):
        parse(f"{flag_of(field)}={value}")


def test_nothing_is_recorded_without_llep():
    with pytest.raises(ValueError, match=r"--moe-llep-record here: .*observe"):
        parse("--moe-llep-record", "here")
