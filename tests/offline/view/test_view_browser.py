"""The page as a person sees it: opened in a headless browser, clicked, read back.

Skipped where there is no Chromium; tools/install_browser.sh installs one.
"""

import re
import time

import pytest
from view_recordings import (
    HOME,
    HOT_BATCH,
    HOT_EXPERT,
    HOT_LAYER,
    HOT_STEP,
    STEPS,
    P,
    hot_counts,
    write_planted,
)

from megatron_llep.offline.cli import main
from megatron_llep.planner import make_plan
from support.browser import find_browser, start_browser

READY = "document.body?.dataset.ready"
CLICK_SECONDS = 0.1


def text_of(browser, name):
    return browser.evaluate(f"document.getElementById('{name}').innerText")


def read_table(browser, name):
    """Rows of a table, without its head."""
    script = f"""[...document.querySelectorAll('#{name} tr')].slice(1).map(
        (row) => [...row.cells].map((cell) => cell.innerText))"""
    return browser.evaluate(script)


def read_bars(browser, kind):
    script = f"""[...document.querySelectorAll('#ranks rect.{kind}[data-rank]')].map(
        (bar) => Number(bar.dataset.pairs))"""
    return browser.evaluate(script)


def place_of(browser, row, column):
    """The middle of a cell of the heat map, in the window."""
    script = f"""(() => {{
        const box = document.getElementById('imbalance').getBoundingClientRect();
        const place = llepPage.place;
        return [box.left + place.left + ({column} + 0.5) * place.cellWidth,
                box.top + place.top + ({row} + 0.5) * place.cellHeight];
    }})()"""
    return browser.evaluate(script)


def click_seconds(browser):
    """Of drawing all anew; the least of several, as others may be using the CPU."""
    return browser.evaluate(
        """(async () => {
            const times = [];
            for (let cell = 0; cell < 8; cell++) {
                const start = performance.now();
                llepPage.select(cell);
                times.push(performance.now() - start);
                await new Promise(requestAnimationFrame);
            }
            return Math.min(...times) / 1000;
        })()"""
    )


def choose(browser, name, value):
    browser.evaluate(
        f"""(() => {{
            const menu = document.getElementById('{name}');
            menu.value = '{value}';
            menu.dispatchEvent(new Event('change'));
        }})()"""
    )


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    program = find_browser()
    if program is None:
        pytest.skip("needs Chromium: tools/install_browser.sh")
    profile = tmp_path_factory.mktemp("browser") / "profile"
    profile.mkdir()
    with start_browser(program, profile) as started:
        started.resize(1280, 800)
        yield started


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """One of a run that lent, and one of a run that only observed."""
    folder = tmp_path_factory.mktemp("pages")
    made = {}
    for planner in ("tolerant", "observe"):
        made[planner] = folder / f"{planner}.html"
        recording = write_planted(folder / planner, planner=planner)
        assert main(["view", str(recording), "--output", str(made[planner])]) == 0
    return made


@pytest.fixture
def page(browser, pages):
    browser.events.clear()
    browser.open(pages["tolerant"], ready=READY)
    yield browser
    assert browser.complaints == []
    # It loads itself and nothing else.
    assert browser.requests == [pages["tolerant"].as_uri()]


def test_a_click_shows_ranks_and_loans_before_and_after(page):
    plan = make_plan(hot_counts())
    page.click(*place_of(page, 0, 2))  # elsewhere first
    assert text_of(page, "cell-title") == "Layer 1, step 2"
    assert read_bars(page, "before") == read_bars(page, "after") == [4 * 4 * 50] * P
    page.click(*place_of(page, 1, HOT_STEP))
    assert text_of(page, "cell-title") == f"Layer {HOT_LAYER}, step {HOT_STEP}"
    assert f"micro-batch {HOT_BATCH}" in text_of(page, "cell-note")
    assert read_bars(page, "before") == plan.load_per_rank_before.tolist()
    assert read_bars(page, "after") == plan.load_per_rank_after.tolist()
    loans = {(e, h, b): int(plan.quota[e, b]) for e, h, b in plan.transfers.tolist()}
    assert loans, "the planted layer must lend"
    found = {}
    for expert, ranks, pairs in read_table(page, "loans"):
        home, borrower = ranks.split(" → ")
        number = int(expert.removeprefix("expert "))
        found[number, int(home), int(borrower)] = int(pairs.replace(",", ""))
    assert found == loans
    hottest = read_table(page, "experts")[0]
    lent = sum(pairs for (expert, *_), pairs in loans.items() if expert == HOT_EXPERT)
    assert hottest == [f"expert {HOT_EXPERT}", f"rank {HOME}", "4,200", f"{lent:,}"]


def test_it_opens_at_the_worst_cell_and_comes_back_to_it(page):
    title = f"Layer {HOT_LAYER}, step {HOT_STEP}"
    assert text_of(page, "cell-title") == title
    page.click(*place_of(page, 0, 0))
    assert text_of(page, "cell-title") != title
    page.evaluate("document.getElementById('go-worst').click()")
    assert text_of(page, "cell-title") == title


def test_arrow_keys_move_the_selected_cell(page):
    page.click(*place_of(page, 0, 4))  # which gives the canvas the focus
    for key, title in [
        ("ArrowRight", "Layer 1, step 5"),
        ("ArrowDown", "Layer 3, step 5"),
        ("ArrowDown", "Layer 3, step 5"),  # there is no other
        ("ArrowLeft", "Layer 3, step 4"),
        ("ArrowUp", "Layer 1, step 4"),
        ("End", f"Layer 1, step {STEPS - 1}"),
        ("Home", "Layer 1, step 0"),
    ]:
        page.press(key)
        assert text_of(page, "cell-title") == title, key
        assert text_of(page, "readout").startswith(title)


def test_another_planner_is_shown_when_it_is_chosen(page):
    page.click(*place_of(page, 1, HOT_STEP))
    for number, planner in enumerate(["tolerant", "exact", "lla"], start=1):
        choose(page, "method", number)
        plan = make_plan(hot_counts(), planner=planner)
        assert read_bars(page, "after") == plan.load_per_rank_after.tolist()
        # The heat map is now of what that planner leaves.
        shown = page.evaluate(f"llepPage.values[{STEPS + HOT_STEP}]")
        assert shown == pytest.approx(plan.imbalance_after)
    assert page.evaluate("document.getElementById('side').value") == "after"


def test_the_heat_map_has_the_imbalance_of_each_cell(page):
    values = page.evaluate("llepPage.values")
    plan = make_plan(hot_counts())
    expected = [1.0] * (2 * STEPS)
    expected[STEPS + HOT_STEP] = plan.imbalance_before
    assert values == pytest.approx(expected, abs=1e-3)
    hot, other = page.evaluate(
        f"""(() => {{
            const canvas = document.getElementById('imbalance'), place = llepPage.place;
            const y = place.top + 1.5 * place.cellHeight;
            const row = canvas.getContext('2d').getImageData(0, y, canvas.width, 1).data;
            return [{HOT_STEP}, 2].map((column) => {{
                const x = Math.round(place.left + (column + 0.2) * place.cellWidth);
                return [...row.slice(4 * x, 4 * x + 3)];
            }});
        }})()"""
    )
    assert sum(hot) < sum(other)  # hot is dark on light paper


def test_each_planner_has_a_line_of_time(page):
    lines = page.evaluate(
        "[...document.querySelectorAll('#times polyline')].map((line) => line.dataset.line)"
    )
    assert lines == ["plain", "recorded", "tolerant", "exact", "lla", "auto"]
    points = page.evaluate("document.querySelector('[data-line=plain]').points.length")
    assert points == STEPS
    for name in ("plain EP", "tolerant", "exact"):
        assert re.search(rf"{name}.* [0-9.]+ (µs|ms|s)", text_of(page, "times-legend"))


def test_drift_names_the_expert_that_got_hot(page):
    page.click(*place_of(page, 1, HOT_STEP))
    assert f"expert {HOT_EXPERT} is the hottest here (step {HOT_STEP})" in text_of(
        page, "drift-note"
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_wider_than_the_window(page, scheme):
    page.prefer(scheme)
    wide = page.evaluate(
        """[...document.querySelectorAll('body *')].filter((element) =>
            element.getBoundingClientRect().right > 1280).map((element) => element.outerHTML)"""
    )
    assert wide == []
    assert page.evaluate("document.documentElement.scrollWidth") == 1280
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (paper == "rgb(255, 255, 255)") == (scheme == "light")


def test_a_click_is_answered_at_once(page):
    assert click_seconds(page) < CLICK_SECONDS


def test_a_run_that_observed_shows_what_planners_would_do(browser, pages):
    browser.events.clear()
    browser.open(pages["observe"], ready=READY)
    plan = make_plan(hot_counts())
    assert text_of(browser, "cell-title") == f"Layer {HOT_LAYER}, step {HOT_STEP}"
    assert read_bars(browser, "after") == plan.load_per_rank_after.tolist()
    assert "tolerant would make it" in text_of(browser, "summary")
    assert browser.complaints == []


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_hundred_thousand_layer_steps_stay_quick(browser, tmp_path):
    from benchmarks.view_time import write_recording

    write_recording(tmp_path / "run", rows=100_000)
    page = tmp_path / "view.html"
    used = time.process_time()
    assert main(["view", str(tmp_path / "run"), "--output", str(page)]) == 0
    assert time.process_time() - used < 120
    assert page.stat().st_size < 3e6
    browser.open(page, ready=READY)
    assert click_seconds(browser) < CLICK_SECONDS
