# SPDX-License-Identifier: Apache-2.0
"""The report in a real browser, opened from a disk: searched, sorted, filtered, walked, linked."""

import re

import pytest
from browser import browser, needs_chromium
from demo_cases import report_values
from made_features import HOSTILE, MadeUp

from mikernels.demo import report
from mikernels.report import write_report

pytestmark = needs_chromium
MADE = MadeUp(700)
ALIVE = [f for f in range(700) if MADE.counts[f]]
ROWS = [{"step": i, "fvu": 1 / (1 + i), "l0": 32.0, "dead_fraction": 0.1} for i in range(40)]


IMAGE = "data:image/png;base64,"
DIGIT = {
    "count": 9, "density": 0.1, "histogram": [1] * 20, "labels": [(7, 0.5)], "direction": IMAGE,
    "digits": [(IMAGE, 1.0)] * 12,
}  # fmt: skip


@pytest.fixture(scope="module")
def chromium():
    with browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "report"
    write_report(
        MADE, folder, title="Features of SmolLM2-135M's layer 14", metrics=ROWS,
        known={"sae": "out/sae"}, command="mikernels report out/sae --model smollm2",
    )  # fmt: skip
    return folder


def data(tab):
    """The files of data that were loaded, by their script elements."""
    sources = tab.page.locator("script[src]").evaluate_all("found => found.map(e => e.src)")
    return [re.search(r"data/([\w-]+)\.js$", source)[1] for source in sources]


def listed(tab):
    return [int(text) for text in tab.page.locator("#rows td:first-child").all_inner_texts()]


def total(tab, text):
    tab.page.get_by_role("status").filter(has_text=text).wait_for()


def test_a_list_of_features_is_searched_sorted_and_filtered(chromium, folder):
    with chromium.open(folder / "index.html") as tab:
        page = tab.page
        total(tab, "700 features")
        assert data(tab) == ["index"] and listed(tab) == list(range(50))
        assert page.get_by_role("heading", name="Training").is_visible()

        page.get_by_role("button", name="Next page").click()
        assert listed(tab) == list(range(50, 100))
        by_count = sorted(range(700), key=lambda f: (-MADE.counts[f], f))
        page.get_by_role("button", name="how often").click()
        assert listed(tab) == by_count[:50] and data(tab) == ["index"]
        assert page.locator("th[aria-sort=descending]").inner_text() == "how often"
        page.get_by_role("button", name="how often").click()
        assert listed(tab)[0] == 7

        page.get_by_label("Kind of feature").select_option("dead")
        total(tab, f"{700 - len(ALIVE)} of 700 features")
        page.get_by_label("Kind of feature").select_option("dense")
        dense = [f for f in reversed(by_count) if MADE.counts[f] > 3000]
        total(tab, f"{len(dense)} of 700 features")
        assert sorted(listed(tab)) == sorted(dense[:50])
        page.get_by_label("Kind of feature").select_option("all")
        bar = page.locator(".bins button").filter(has_not=page.locator("[aria-pressed=true]")).last
        bar.click()
        top = [f for f in ALIVE if MADE.counts[f] / 30_000 >= 10**-0.25]
        assert sorted(listed(tab)) == top
        bar.click()

        # a number, tokens it fires on, tokens it promotes: found in this order
        search = page.get_by_label("Search features")
        search.fill("123")
        total(tab, "1 of 700 features")
        assert listed(tab) == [123] and "promoted" in data(tab)
        search.fill("UP12X0")
        total(tab, "8 of 700 features")
        assert listed(tab)[0] in range(12, 700, 89)
        page.get_by_label("Search in").select_option("tokens")
        total(tab, "0 of 700 features")
        search.fill("</SCRIPT>")
        total(tab, "1 of 700 features")
        search.press("Enter")
        page.get_by_role("heading", name=re.compile("^Feature 1")).wait_for()
        assert page.url.endswith("#f1") and data(tab) == ["index", "promoted", "features-00000"]
        tab.check(folder)
        tab.photograph("report-desktop", whole=False)


def test_one_feature_has_a_link_and_shows_every_token_as_text(chromium, folder):
    with chromium.open(folder.as_uri() + "/index.html#f300") as tab:
        page = tab.page
        heading = page.locator("#card h3")
        heading.wait_for()
        assert heading.inner_text().startswith("Feature 300")
        # only what is looked at was loaded
        assert sorted(data(tab)) == ["features-00002", "index"]
        view = MADE.view(300)
        peaks = page.locator("#card .peak")
        assert peaks.count() == len(view.examples) + len(view.samples)
        peaks.first.hover()
        assert page.locator(".tip").inner_text() == f"{view.maximum:.4g}"
        assert page.locator(".bars.up li").first.inner_text().split() == ["up33x0", "+2.5"]
        assert page.locator(".bars.down li").count() == 10
        page.keyboard.press("ArrowRight")
        page.locator("#card h3", has_text="Feature 301").wait_for()
        page.keyboard.press("j")
        page.keyboard.press("k")
        page.keyboard.press("k")
        page.locator("#card h3", has_text="Feature 300").wait_for()
        page.locator(".similar a").first.click()
        page.locator("#card h3", has_text="Feature 301").wait_for()
        page.go_back()
        page.locator("#card h3", has_text="Feature 300").wait_for()
        page.keyboard.press("/")
        assert page.evaluate("document.activeElement.id") == "query"
        page.evaluate("location.hash = '#f12345'")
        page.get_by_text("Feature 12345 is not in this report").wait_for()
        for f in (f for f in range(len(HOSTILE)) if f in ALIVE):
            page.evaluate(f"location.hash = '#f{f}'")
            page.locator("#card h3", has_text=re.compile(f"^Feature {f} ")).wait_for()
            shown = page.locator("#card .peak").first.text_content()
            for hidden in ("\n", "\t", "\x00", "\x1b", "\u2028", "\u2029", "\u202e", "\ud800"):
                assert hidden not in shown
            if HOSTILE[f].strip() and HOSTILE[f].isprintable():
                assert shown == HOSTILE[f]
            elif HOSTILE[f].strip(" ") != "" or HOSTILE[f] == "":
                assert page.locator("#card .peak i.nl").count() > 0
        assert page.locator("#card b, #card script").count() == 0
        tab.check(folder)


def test_a_phone_shows_the_list_or_one_feature(chromium, folder):
    with chromium.open(folder / "index.html", "phone", dark=True) as tab:
        page = tab.page
        total(tab, "700 features")
        assert data(tab) == ["index"]
        tab.check(folder)
        tab.photograph("report-phone")
        page.locator("#rows a", has_text=re.compile("^20$")).click()
        page.locator("#card h3", has_text="Feature 20").wait_for()
        assert not page.locator("#rows").is_visible() and not page.locator("h1").is_visible()
        tab.check(folder)
        tab.photograph("report-phone-feature")
        page.get_by_role("button", name="Next feature").click()
        page.locator("#card h3", has_text="Feature 21").wait_for()
        page.get_by_role("button", name="List").click()
        assert page.locator("#rows").is_visible() and page.url.endswith("index.html")
        assert page.evaluate("document.activeElement.textContent") == "21"


def test_the_demos_page_has_the_same_cards_and_fits_a_phone(chromium, tmp_path):
    path = tmp_path / "report.html"
    views = [MADE.view(f) for f in (1, 20, 31)]
    values = report_values([], views=views)
    report.write(path, values)
    with chromium.open(path, "phone") as tab:
        assert tab.page.locator(".feature").evaluate_all("found => found.map(e => e.id)") == [
            "f1", "f20", "f31",
        ]  # fmt: skip
        assert tab.page.locator("#f1 .peak").first.inner_text() == "</script>"
        assert tab.page.locator("svg:visible").count() == 3 + 2
        tab.check()
        tab.photograph("demo-phone")
    digits = [{**DIGIT, "number": f} for f in (3, 4)]
    report.write(path, {**values, "kind": "mnist", "cards": digits, "views": []})
    with chromium.open(path, "phone") as tab:
        assert tab.page.locator(".feature svg.spark rect").count() == 2 * 20
        tab.check()


def test_a_file_that_is_missing_is_said(chromium, tmp_path):
    write_report(MadeUp(3), tmp_path / "report")
    (tmp_path / "report" / "data" / "features-00000.js").unlink()
    with chromium.open((tmp_path / "report").as_uri() + "/index.html#f1") as tab:
        tab.page.get_by_text("data/features-00000.js is missing; keep the folder tog").wait_for()
