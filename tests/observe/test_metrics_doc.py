"""docs/metrics.md names all metrics, and none that is not logged."""

import re
from pathlib import Path

import numpy as np
import pytest

from megatron_llep.metrics.names import BUSIEST, EXPERT_METRICS, METRICS, OF_PLAIN, PREFIX
from megatron_llep.metrics.reduce import Reduced
from megatron_llep.metrics.summary import name_values
from megatron_llep.observe.outlook import NUM_ROWS, PLANNERS

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "metrics.md").read_text()
ROWS = re.findall(r"^\| `(\w+)` \| (.*?) \| (yes)? ?\| (yes)? ?\| (yes)? ?\|$", TEXT, re.MULTILINE)
STANDS_FOR = {"pN": r"p(50|75|90|95)", "PLANNER": f"({'|'.join(PLANNERS)})", "_K_": r"_([1-3])_"}


def fits(row: str, name: str) -> bool:
    pattern = row
    for word, meaning in STANDS_FOR.items():
        pattern = pattern.replace(word, meaning)
    return re.fullmatch(pattern, name) is not None


@pytest.mark.parametrize("lends", [True, False])
def test_what_is_logged_is_what_the_table_says(lends):
    reduced = Reduced(
        ran=np.array([True, False, True]),
        lends=lends,
        metrics=np.ones((len(METRICS), 3)),
        experts=np.ones((4, 3)),
        outlook=np.zeros((NUM_ROWS, 3)) if lends else np.ones((NUM_ROWS, 3)),
        other_seconds=1.0,
    )
    logged = {name.removeprefix(PREFIX) for name in name_values(reduced, per_layer=True)}
    whole = {name for name in logged if not re.search(r"_layer_\d+$", name)}
    by_layer = {re.sub(r"_layer_\d+$", "", name) for name in logged - whole}
    expected = {row for row, _, _, lending, observed in ROWS if (lending if lends else observed)}
    assert {row for row, *_ in ROWS if any(fits(row, name) for name in whole)} == expected
    assert all(any(fits(row, name) for row in expected) for name in whole)
    assert by_layer == {row for row, _, each, *_ in ROWS if each and row in expected}
    assert {int(n.rpartition("_")[2]) for n in logged - whole} == {0, 2}
    assert len([name for name in whole if name.startswith("busiest_")]) == 3 * BUSIEST


def test_the_table_explains_them_as_the_code_does():
    explained = {name: text for name, text, *_ in ROWS}
    for each in (*METRICS, *EXPERT_METRICS):
        assert explained[each.name] == each.help
    assert set(OF_PLAIN) <= {name for name, *_, observed in ROWS if observed}
