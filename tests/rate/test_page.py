# SPDX-License-Identifier: Apache-2.0
"""The page: what it tells and what it hides, who may use it, and a whole session in a browser."""

import json
import re
import signal
import subprocess
import sys
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest
from browser import browser, needs_chromium
from full_disk import largest_file
from rate_cases import number, rated, some_items, world

from mikernels import cli
from mikernels.activations import write_shards
from mikernels.integrations.saelens import export_sae
from mikernels.rate.session import Session, ratings_path

pytest.importorskip("flask")
from mikernels.rate import server  # noqa: E402  (after what it needs)

SECRET, PORT = "s3cret", 4321
OWN = f"http://127.0.0.1:{PORT}"


@pytest.fixture
def folder(tmp_path):
    some_items(tmp_path, features=3, controls=1, repeats=1, questions=4)
    return tmp_path


@pytest.fixture
def client(folder):
    session = Session(folder, "ada")
    made = server.make_app(session, SECRET, PORT, lambda: None).test_client()
    made.session = session
    return made


def entry(turn=0, answers=(True, None, False, None), rating=None, words="", finish=False):
    return {
        "turn": turn,
        "answers": list(answers),
        "rating": rating,
        "description": words,
        "finish": finish,
    }


def post(client, value, secret=SECRET, base=OWN, **more):
    headers = {"Origin": OWN, **more}
    return client.post(f"/{secret}/save", base_url=base, json=value, headers=headers)


def test_page_escapes_tokens_and_tells_nothing(client):
    answer = client.get(f"/{SECRET}/", base_url=OWN)
    page = answer.get_data(as_text=True)
    turn = client.session.ratings.turns[0]
    item = client.session.item(turn)
    for passage in (*item.evidence, *item.questions):
        for token in passage.tokens:
            escaped = token[1:].replace("&", "&amp;").replace("<", "&lt;")
            assert re.search(rf" <span( class=\"plus s\d( peak)?\")?>{escaped}</span>", page)
    shown = page.split('class="questions"')
    # what is asked is not shaded, and nothing says which feature or control it is
    assert shown[0].count('class="plus') >= len(item.evidence)
    assert "plus" not in shown[1] and "minus" not in shown[1]
    assert not re.search(r"mismatched|random|control|repeat|right|quarter|feature \d", page)
    policy = answer.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self';")
    assert not re.search(r" style=| on\w+=|<style|<script>|https?:", page)
    order = [item.questions[i].tokens[0].strip()[:-1] for i in turn.order]
    places = [shown[1].index(token) for token in order]
    assert places == sorted(places)


def test_strangers_are_refused(client):
    path = client.session.path
    before = path.read_bytes()
    good = entry()
    refused = [
        client.get(f"/{SECRET}/", base_url=f"http://evil.example:{PORT}"),
        client.get(f"/{SECRET}/", base_url="http://127.0.0.1:1"),
        client.get("/", base_url=OWN),
        client.get("/wrong/", base_url=OWN),
        client.get("/wrong/static/rate.js", base_url=OWN),
        client.get(f"/{SECRET}/static/..%2fserver.py", base_url=OWN),
        client.get(f"/{SECRET}/save", base_url=OWN),
        post(client, good, secret="wrong"),
        post(client, good, base=f"http://evil.example:{PORT}", Origin="http://evil.example:4321"),
        post(client, good, Origin="http://evil.example"),
        post(client, good, Origin="null"),
        post(client, good, Origin=""),
        post(client, good, **{"Content-Type": "text/plain"}),
        post(client, entry(words="x" * 70_000)),
    ]
    codes = [403, 403, 404, 404, 404, 404, 404, 404, 403, 403, 403, 403, 403, 413]
    assert [answer.status_code for answer in refused] == codes
    assert path.read_bytes() == before
    assert client.get(f"/{SECRET}/static/rate.js", base_url=OWN).status_code == 200
    assert client.get(f"/{SECRET}/", base_url=f"http://localhost:{PORT}").status_code == 200
    assert post(client, good).status_code == 200
    assert path.read_bytes() != before


@pytest.mark.parametrize(
    "value, code, message",
    [
        (entry(turn=1), 409, "turn must be 0, got 1; reload the page"),
        (entry(answers=[True]), 400, "answers must be 4, got 1"),
        (entry(answers=["yes", None, None, None]), 400, "answers.0: input should be a valid bool"),
        (entry(rating=6), 400, "rating: input should be less than or equal to 5, got 6"),
        (entry(finish=True), 400, "all questions and the rating must be answered"),
        (entry(words="\ud800"), 400, "what is sent must"),
        ({"turn": 0}, 400, "answers: field required"),
        ([], 400, "an object"),
    ],
)
def test_what_is_not_an_answer_changes_nothing(client, value, code, message):
    before = client.session.path.read_bytes()
    answer = post(client, value)
    assert answer.status_code == code and message in answer.json["error"]
    assert client.session.path.read_bytes() == before


def test_every_answer_is_kept_and_finished_turns_stay(client, folder):
    assert post(client, entry(words="a <b>")).status_code == 200
    # another process, after a crash
    again = Session(folder, "ada")
    assert again.current == 0 and again.ratings.turns[0].answers == [True, None, False, None]
    page = client.get(f"/{SECRET}/", base_url=OWN).get_data(as_text=True)
    assert page.count(" checked>") == 2 and "a &lt;b&gt;</textarea>" in page
    assert post(client, entry(answers=[True] * 4, rating=4, finish=True)).status_code == 200
    assert post(client, entry(answers=[False] * 4, rating=1)).status_code == 409
    turn = Session(folder, "ada").ratings.turns[0]
    assert (turn.answers, turn.rating, bool(turn.finished)) == ([True] * 4, 4, True)
    # a full disk: what was saved stays, and the page says so
    before = client.session.path.read_bytes()
    with largest_file(100):
        answer = post(client, entry(turn=1))
    assert answer.status_code == 507 and "the ratings must be written" in answer.json["error"]
    assert client.session.path.read_bytes() == before and client.session.current == 1
    assert client.session.ratings.turns[1].answers == [None] * 4


def test_turns_of_a_rater(tmp_path):
    items = some_items(tmp_path, features=7, controls=2, repeats=3)
    sessions = [Session(tmp_path, name) for name in ("ada", "bob")]
    orders = [[(t.item, t.repeat) for t in s.ratings.turns] for s in sessions]
    assert sorted(orders[0]) == sorted(orders[1]) and orders[0] != orders[1]
    for order in orders:
        assert sorted(i for i, repeat in order if not repeat) == sorted(i.id for i in items.items)
        assert [i for i, repeat in order if repeat] == [i for i, _ in order[9:]]
        # the second time is long after the first
        for at, (item, _) in enumerate(order[9:], 9):
            assert at - order.index((item, False)) >= 8
    first = sessions[0].ratings.turns
    again = [t.order for t in first if t.item == first[-1].item]
    assert len(again) == 2 and again[0] != again[1]


@pytest.mark.parametrize("name", ["", "items", "REPORT", "../x", ".x", "a/b", "a" * 41, "ä"])
def test_names_that_are_no_files(tmp_path, name):
    with pytest.raises(ValueError, match="rate: --rater must be 1 to 40 letters"):
        ratings_path(tmp_path, name)


def test_ratings_that_were_edited_are_refused(folder):
    path = rated(folder, "ada", lambda item, turn: ([True] * 4, 3, "")).path
    good = json.loads(path.read_text())
    for change, message in (
        ({"rating": None}, "all answers and a rating of what is finished"),
        ({"order": [0, 0, 1, 2]}, "an order of 4 questions"),
        ({"order": [0, 1], "answers": [True, True]}, "must hold 4 answers of item"),
        ({"item": "99"}, "must hold a turn of each item"),
    ):
        turns = [{**good["turns"][0], **change}, *good["turns"][1:]]
        path.write_text(json.dumps({**good, "turns": turns}))
        with pytest.raises(ValueError, match=message):
            Session(folder, "ada")


class Command:
    """`mikernels rate ...` as a process, which starts while the browser does."""

    def __init__(self, *arguments):
        start = [sys.executable, "-c", "from mikernels.cli import main; main()", "rate"]
        self.process = subprocess.Popen(
            [*start, *map(str, arguments), "--no-open"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            # of a job in the background it is ignored, and so in what that starts
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.kill()
        self.process.communicate()

    def address(self):
        said = ""
        while not (found := re.search(r"http://127\.0\.0\.1:\d+/\S+/", said)):
            line = self.process.stdout.readline()
            assert line, said
            said += line
        return found[0]

    def interrupt(self):
        """What it said since its address, and its exit code."""
        self.process.send_signal(signal.SIGINT)
        return self.process.communicate(timeout=60)[0], self.process.returncode


@contextmanager
def elsewhere():
    """A page of another origin."""

    class Page(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()

        def log_message(self, *arguments):
            pass

    site = HTTPServer(("127.0.0.1", 0), Page)
    Thread(target=site.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{site.server_port}/"
    finally:
        site.shutdown()
        site.server_close()


def play(tab, items, ratings, keys=False):
    """Answer the item on the page rightly, but for controls: always yes. Returns its turn."""
    page = tab.page
    at = int(page.locator("#turn").get_attribute("data-turn"))
    turn = ratings["turns"][at]
    item = next(item for item in items["items"] if item["id"] == turn["item"])
    right = [item["control"] or item["questions"][i]["right"] for i in turn["order"]]
    if keys:
        for one in right:
            page.keyboard.press("y" if one else "n")
        page.keyboard.press("5")
    else:
        for place, one in enumerate(right):
            page.locator(f"#q{place} label").nth(0 if one else 1).click()
        page.locator("#rating label").nth(1 if item["control"] else 4).click()
    return at


@needs_chromium
def test_a_session_in_a_browser(tmp_path, monkeypatch, capsys):
    sae, rows, pieces = world()
    export_sae(sae, tmp_path / "run")
    write_shards(tmp_path / "acts", [rows], metadata={"pieces": pieces})
    made = ("--activations", tmp_path / "acts", "--features", 3, "--controls", 1, "--repeats", 1)
    folder = tmp_path / "run" / "rate"
    arguments = (tmp_path / "run", "--rater", "ada", *made, "--questions", 4)
    with Command(*arguments) as command, browser() as chromium:
        url = command.address()
        items = json.loads((folder / "items.json").read_text())

        def saved():
            return json.loads((folder / "ada.json").read_text())

        with chromium.open(url) as tab:
            page = tab.page
            tab.photograph("rate-desktop")
            assert page.locator("#next").is_disabled()
            page.keyboard.press("y")
            page.locator("#q2 label").nth(1).click()
            # soon after the last letter
            with page.expect_response(lambda answer: "<b>" in (answer.request.post_data or "")):
                page.locator("#description").fill("it is <b>")
            page.reload()
            assert saved()["turns"][0]["answers"] == [True, None, False, None]
            assert page.locator("#q0 input").nth(0).is_checked()
            assert page.locator("#q2 input").nth(1).is_checked()
            assert page.locator("#description").input_value() == "it is <b>"
            assert "2 texts and the rating" in page.locator("#left").inner_text()
            play(tab, items, saved())
            page.locator("#next").click()
            page.wait_for_selector("#turn[data-turn='1']")
            play(tab, items, saved(), keys=True)
            page.keyboard.press("Enter")
            page.wait_for_selector("#turn[data-turn='2']")
            tab.check()
        with elsewhere() as site, chromium.open(site) as tab:
            before = (folder / "ada.json").read_bytes()
            answers = [True] * 4
            forged = {**entry(2, answers, 1), "finish": True}
            for kind in ("text/plain", "application/json"):
                tab.page.evaluate(
                    """([url, body, kind]) => fetch(url + "save", {method: "POST", body,
                    mode: kind == "text/plain" ? "no-cors" : "cors",
                    headers: {"Content-Type": kind}}).catch(() => null)""",
                    [url, json.dumps(forged), kind],
                )
            assert (folder / "ada.json").read_bytes() == before
        with chromium.open(url, "phone", dark=True) as tab:
            tab.photograph("rate-phone")
            for at in (2, 3, 4):
                tab.page.wait_for_selector(f"#turn[data-turn='{at}']")
                tab.check()
                assert play(tab, items, saved()) == at
                tab.page.locator("#next").click()
            tab.page.wait_for_selector("main.done")
            tab.photograph("rate-done")
            tab.check()
        said, code = command.interrupt()
    assert code == 0 and "all items are rated" in said and "5 of 5 items rated" in said
    assert str(folder / "ada.json") in said.replace("\n", "")
    monkeypatch.setattr(sys, "argv", ["mikernels", "rate", str(tmp_path / "run"), "--report"])
    monkeypatch.setenv("COLUMNS", "160")
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
    out = capsys.readouterr().out
    found = json.loads((folder / "report.json").read_text())
    assert found["groups"]["rated"]["accuracy"]["value"] == 1
    assert found["groups"]["controls"]["accuracy"]["value"] == 0.5
    assert found["gain"]["value"] == 0.5 and found["rating_gain"]["value"] == 3
    assert [pair["raters"] for pair in found["agreement"]] == [["ada", "ada"]]
    assert found["agreement"][0]["answers"]["value"] == 1
    words = [item["descriptions"] for item in found["items"] if item["descriptions"]]
    assert words == [{"ada": "it is <b>"}] and "ada: it is <b>" in out
    assert all(0 <= number(item["name"]) < 12 for item in found["items"])
    left = sorted(path.name for path in folder.iterdir())
    assert left == ["ada.json", "items.json", "report.json"]
