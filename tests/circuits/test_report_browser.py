# SPDX-License-Identifier: Apache-2.0
"""The page about circuits in a real browser: seen at two widths, pointed at, filtered, walked."""

import re

import pytest
from browser import browser, needs_chromium
from report_cases import GRAPH, TOKENS, circuit, curve, patterns, tokens

from mikernels.circuits import write_report
from mikernels.circuits.report.graph import components

pytestmark = needs_chromium
FOUND = circuit("gim")
HEADS = [name for name, _, _ in components(FOUND, 12) if ".h" in name][:3]

HEADINGS = (
    "Strongest components",
    "Tokens",
    "Layer by layer",
    "The circuit",
    "What the strongest heads attend to",
    "How faithful it is",
    "Fidelity and stability",
    "How this was made",
)


@pytest.fixture(scope="module")
def chromium():
    with browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(
        [FOUND, circuit("eap", 1)], path, title="How SmolLM2-135M completes 32 prompts",
        tokens=tokens(), patterns=patterns(HEADS),
        curves=[curve("gim", 1.1), curve("eap", 0.9), curve("random", 0.3)],
        curves_by_size=[curve("gim", 1.0), curve("eap", 0.8), curve("random", 0.2)],
        known={"model": "SmolLM2-135M", "prompt": "".join(TOKENS)},
        command="mikernels circuits --model smollm2 --task ioi -n 32 --method gim --compare eap",
    )  # fmt: skip
    return path


def strongest(n):
    """(score, writer, reader) of the n strongest edges, by numbers."""
    pairs = FOUND.graph.allowed().nonzero().tolist()
    rows = [(FOUND.scores[w, r].item(), w, r) for w, r in pairs]
    return sorted(rows, key=lambda row: -abs(row[0]))[:n]


def name(edge):
    return f"{GRAPH.writers[edge[1]]} → {GRAPH.readers[edge[2]]}"


def of_node(writer, edges):
    number = GRAPH.writers.index(writer)
    return {name(e) for e in edges if e[1] == number or number in GRAPH.feeds[e[2]]}


def names_in(tab, selector):
    return set(tab.page.locator(selector).evaluate_all("found => found.map(e => e.dataset.name)"))


@pytest.mark.parametrize("size, dark", [("desktop", False), ("phone", True)])
def test_the_page_stands_alone_and_fits(chromium, page, size, dark):
    with chromium.open(page, size, dark) as tab:
        tab.page.locator(".edge").first.wait_for(state="attached")
        tab.check()
        for heading in HEADINGS:
            assert tab.page.get_by_role("heading", name=heading, exact=True).is_visible()
        assert "</script>" in tab.page.locator(".tokens").inner_text()
        assert tab.page.locator(".heads canvas").count() == 3
        assert names_in(tab, ".edge") == set(map(name, strongest(60)))
        # drawn, each where its layer and head are
        boxes = [tab.page.locator(f"[data-name='{n}']").bounding_box() for n in ("input", "logits")]
        assert boxes[0]["y"] > boxes[1]["y"] + 300
        assert tab.page.evaluate("getComputedStyle(document.body).backgroundColor") == (
            "rgb(22, 24, 27)" if dark else "rgb(253, 252, 250)"
        )
        tab.photograph(f"circuits-{size}")


def test_the_graph_is_pointed_at_filtered_and_walked(chromium, page):
    edges = strongest(200)
    sixty = edges[:60]
    with chromium.open(page) as tab:
        form = tab.page.locator("form.filters")
        node = next(n for n in HEADS if of_node(n, sixty))
        at = tab.page.locator(f".node[data-name='{node}']")
        at.scroll_into_view_if_needed()
        at.hover()
        assert names_in(tab, ".edge.on") == of_node(node, sixty)
        assert node in tab.page.locator(".tip").inner_text()
        at.click()
        assert at.get_attribute("aria-pressed") == "true"
        # those of the chosen node, also beyond the sixty
        assert names_in(tab, ".edge") == set(map(name, sixty)) | of_node(node, edges)
        assert tab.page.locator("aside h3").inner_text() == node
        assert tab.page.locator("aside tr").count() == len(of_node(node, edges))
        tab.photograph("circuits-chosen", whole=False)
        at.press("Escape")
        assert names_in(tab, ".edge.on") == of_node(node, sixty)  # where the keyboard still is
        at.press("ArrowUp")
        there = tab.page.evaluate("document.activeElement.dataset.name")
        assert there != node and int(re.search(r"\d+|$", there)[0] or 99) > int(
            node[1:].split(".")[0]
        )

        # beyond the logits there is nothing
        for _ in range(30):
            tab.page.keyboard.press("ArrowUp")
        assert tab.page.evaluate("document.activeElement.dataset.name") == "logits"
        tab.page.keyboard.press("Enter")
        assert tab.page.locator("aside h3").inner_text() == "logits"
        tab.page.keyboard.press("Enter")

        form.locator("[name=n]").fill("20")
        assert names_in(tab, ".edge") == set(map(name, edges[:20]))
        assert "20 drawn, of 70,651" in tab.page.locator(".is-graph").inner_text()
        form.locator("[name=sign]").select_option("-1")
        assert names_in(tab, ".edge") == {name(e) for e in edges[:20] if e[0] < 0}
        form.locator("[name=sign]").select_option("0")
        form.locator("[name=n]").fill("200")
        form.locator("[value=q]").uncheck()
        form.locator("[name=from]").select_option("10")
        kept = [
            e for e in edges if not GRAPH.readers[e[2]].endswith(".q")
            and e[1] >= GRAPH.first_writer(10)
        ]  # fmt: skip
        assert 0 < len(kept) < 150 and names_in(tab, ".edge") == set(map(name, kept))
        form.locator("[value=q]").check()
        form.locator("[name=from]").select_option("-1")
        form.locator("[name=whole]").check()
        assert names_in(tab, ".edge") == set(map(name, on_paths(edges)))
        form.locator("[name=whole]").uncheck()
        form.locator("[name=method]").select_option("1")
        assert not names_in(tab, ".edge") & set(map(name, edges))
        tab.check()


def on_paths(edges):
    """Those that lead from the input to the logits, found from each end."""
    reached = {0}
    for e in sorted(edges, key=lambda e: e[2]):
        if e[1] in reached:
            reached |= set(GRAPH.feeds[e[2]])
    useful = set()
    for e in sorted(edges, key=lambda e: -e[2]):
        if GRAPH.readers[e[2]] == "logits" or useful & set(GRAPH.feeds[e[2]]):
            useful.add(e[1])
    found = [
        e for e in edges if e[1] in reached
        and (GRAPH.readers[e[2]] == "logits" or useful & set(GRAPH.feeds[e[2]]))
    ]  # fmt: skip
    assert 0 < len(found) < len(edges)
    return found


def test_attention_and_curves_say_what_is_pointed_at(chromium, page):
    weights = patterns(HEADS).weights[0]
    with chromium.open(page) as tab:
        canvas = tab.page.locator(".heads canvas").nth(1)
        canvas.scroll_into_view_if_needed()
        canvas.focus()
        # into the last row, and on to its third cell
        for key in ("ArrowDown", "ArrowRight", "ArrowRight", "ArrowUp"):
            canvas.press(key)
        said = tab.page.locator(".heads output").nth(1)
        value = round(weights[1, -2, 2].item(), 3)
        expected = f"“{TOKENS[-2]}” attends to “{TOKENS[2]}”: {100 * value:.1f}%"
        assert said.inner_text() == expected.strip()
        canvas.blur()
        assert said.inner_text() == ""
        box = canvas.bounding_box()
        canvas.hover(position={"x": 0.4 * box["width"], "y": 0.9 * box["height"]})
        assert "attends to" in said.inner_text()
        drawing = tab.page.locator(".is-curves svg.drawing")
        drawing.scroll_into_view_if_needed()
        drawing.hover()
        shown = tab.page.locator(".tip").inner_text()
        assert re.search(r"edges\ngim: [\d.]+ \[[\d., ]+\]\neap: .*\nrandom: ", shown)
        tab.check()
