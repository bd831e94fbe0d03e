"""What all reports share: tables, JSON, pages, pictures, and turns of what is compared."""

import json
import re

import pytest

from megatron_llep.offline.report.figure import draw_bars, open_figure
from megatron_llep.offline.report.page import (
    make_definitions,
    make_picture,
    make_table,
    make_text,
    write_page,
)
from megatron_llep.offline.report.results import write_results
from megatron_llep.offline.report.table import format_table
from megatron_llep.offline.timing import take_turns


def test_columns_are_aligned():
    rows = [["name", "ms", "note"], ["plain", 12.5, "x"], ["group"], ["  llep", 9, ""]]
    assert format_table(rows, "<><").splitlines() == [
        "name      ms  note",
        "plain   12.5  x",
        "group",
        "  llep     9",
    ]


def test_the_last_alignment_goes_on_and_a_rule_is_as_long_as_the_table():
    lines = format_table([["a", "b", "c"], ["1", "22", "333"]], rule=True).splitlines()
    assert lines == ["a   b    c", "----------", "1  22  333"]


def test_results_are_json_that_every_reader_takes(tmp_path):
    path = tmp_path / "new" / "found.json"
    write_results(path, {"rows": [{"best": float("nan"), "pair": (1, 2.5)}], "none": None})
    found = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert found["rows"] == [{"best": "nan", "pair": [1, 2.5]}]
    assert "torch" in found["machine"], "the machine at hand, if no other is named"
    write_results(path, {}, machine="another")
    assert json.loads(path.read_text()) == {"machine": "another"}


def test_a_page_stands_alone_and_shows_text_as_it_is(tmp_path):
    picture = tmp_path / "picture.png"
    with open_figure(picture, (2, 2)):
        pass
    parts = [
        make_text("a < b", kind="verdict good"),
        make_table([["", "<b>"], [" x ", 1]], "noted"),
        make_table([["k", "v"]], head=False),
        make_definitions({"term": "means & more"}),
        make_picture(picture, "nothing"),
    ]
    write_page(tmp_path / "page.html", "A <title>", parts)
    page = (tmp_path / "page.html").read_text()
    assert '<p class="verdict good">a &lt; b</p>' in page
    assert '<table class="noted"><tr><th></th><th>&lt;b&gt;</th></tr>' in page
    assert "<table><tr><td>k</td><td>v</td></tr></table>" in page
    assert "<dt>term</dt><dd>means &amp; more</dd>" in page
    assert "<td>x</td><td>1</td>" in page
    assert page.count("A &lt;title&gt;") == 2
    assert not re.search(r"https?://|<script|<link|src=\"(?!data:)", page)


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_a_figure_is_the_same_bytes_each_time(tmp_path, suffix):
    files = [tmp_path / folder / f"bars.{suffix}" for folder in ("one", "two")]
    for file in files:
        with open_figure(file, (4, 3), rows=2) as (figure, axes):
            places = draw_bars(axes[0, 0], {"a": [1, 2], "b": [3, 4]}, ["red", "blue"])
            figure.suptitle("bars")
    assert axes.shape == (2, 1)
    assert places["a"].tolist() == pytest.approx([-0.2, 0.8])
    assert places["b"].tolist() == pytest.approx([0.2, 1.2])
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_figure_that_is_not_finished_is_not_written(tmp_path):
    with pytest.raises(RuntimeError, match="half way"), open_figure(tmp_path / "a.png", (2, 2)):
        raise RuntimeError("half way")
    assert not list(tmp_path.iterdir())


def test_all_have_their_turn_and_none_is_always_first():
    turns = list(take_turns("abc", 2, warm_up=1))
    assert [thing for thing, _ in turns] == list("abcbcacab")
    assert [counts for _, counts in turns] == [False] * 3 + [True] * 6
