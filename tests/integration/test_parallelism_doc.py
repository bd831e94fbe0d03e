"""The tables of the documentation are those of the code."""

from pathlib import Path

from megatron_llep.integration.settings.document import update
from megatron_llep.integration.settings.table import SETTINGS

DOC = Path(__file__).parents[2] / "docs" / "parallelism.md"


def test_the_tables_are_up_to_date():
    """If not: python -m megatron_llep.integration.settings.document docs/parallelism.md."""
    text = DOC.read_text()
    for verdict in ("supported", "replaced", "refused", "untried"):
        assert f"<!-- settings: {verdict} -->" in text
    assert update(text) == text


def test_no_row_is_there_twice():
    shown = [setting.shown for setting in SETTINGS]
    assert len(shown) == len(set(shown))


def test_nothing_is_both_supported_and_refused():
    supported = {span for each in SETTINGS if each.verdict == "supported" for span in each.spans}
    assert not supported & {each.flag for each in SETTINGS if each.verdict == "refused"} - {""}
