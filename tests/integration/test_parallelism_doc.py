"""The table of supported and refused combinations says what the code does."""

import re
from pathlib import Path

import pytest

from megatron_llep.training.arguments import _UNSUPPORTED_WITH_LLEP
from megatron_llep.validation import REFUSALS

DOC = Path(__file__).parents[2] / "docs" / "parallelism.md"

# What LLEPConfig, SharedLending, check_config, check_layer, check_same_on_all_ranks and
# check_convertible refuse beside REFUSALS.
OTHER_FLAGS = {
    "--num-experts",
    "--expert-model-parallel-size",
    "--moe-llep-max-foreign-experts",
    "--moe-llep-planner",
    "--moe-llep-replicas",
    "--moe-llep-*",
    "--fp8-format",
    "--moe-llep-expert-gemm",
}


def read_rows(state: str) -> list[tuple[str, str]]:
    """(setting, text) of the rows of this state."""
    rows = [re.split(r"\s*\|\s*", line.strip("| ")) for line in DOC.read_text().splitlines()]
    return [(row[0], row[2] if len(row) > 2 else "") for row in rows if state in row[1:2]]


REFUSED = dict(read_rows("refused"))


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda refusal: refusal.flag)
def test_every_refusal_is_in_the_table_with_its_remedy(refusal):
    assert REFUSED[f"`{refusal.flag}`"] == refusal.remedy


@pytest.mark.parametrize("message", _UNSUPPORTED_WITH_LLEP.values())
def test_what_the_script_refuses_is_in_the_table(message):
    flag, remedy = message.split(": ", 1)
    assert REFUSED[f"`{flag}`"] == remedy


def test_no_flag_is_in_the_table_that_the_code_does_not_refuse():
    known = {refusal.flag for refusal in REFUSALS} | OTHER_FLAGS
    known |= {message.split(":")[0] for message in _UNSUPPORTED_WITH_LLEP.values()}
    listed = {flag for row in REFUSED for flag in re.findall(r"`(--[^ `]+)", row)}
    assert listed == known


def test_nothing_is_both_supported_and_refused():
    supported = {
        flag for row, _ in read_rows("supported") for flag in re.findall(r"`(--[^`]+)", row)
    }
    refused = {refusal.flag for refusal in REFUSALS}
    assert not supported & refused
