# SPDX-License-Identifier: Apache-2.0
"""What README.md and docs/ show is what there is: Python runs as written, commands exist.

The Python of a page runs from top to bottom in one namespace, so that a reader can follow it, on a
small stand-in for the language model and with smaller numbers (SMALL). What cannot run carries a
comment that readers do not see, `<!-- not run: reason -->`, with a reason of NOT_RUN.
"""

import ast
import re
import shlex
from pathlib import Path

import pytest
import torch
import typer.main
from stand_in import in_place_of_smollm2

from mikernels.bench.cli import app as bench_app
from mikernels.cli import app

ROOT = Path(__file__).parents[1]
COMMANDS, BENCH = typer.main.get_command(app), typer.main.get_command(bench_app)
PAGES = sorted({ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")})
FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```$", re.M | re.S)
MARK = re.compile(r"<!-- not run: (.*?) -->\s*$")
NOT_RUN = {
    "the reader's own script, as examples/ has it",
    "needs EAP-IG, which is not on PyPI",
    "needs a kernel of the Hub",
}
# of a page: as written -> as run
SMALL = {
    "README.md": {
        "100_000": "8_192",
        "24_576": "512",
        "1_000_000": "2_048",
        "20_000": "2_000",
        "9_216": "512",
        "32_768": "2_048",
    },
    "docs/circuits.md": {"ioi(tokenizer, 100)": "ioi(tokenizer, 4)", "4_608": "128"},
    "docs/report.md": {"20_000": "2_000", "4_608": "128"},
    "docs/training.md": {
        "100_000": "4_096",
        "24_576": "512",
        "10_000_000": "4_096",
        "50_000": "2_000",
        "1_000_000": "4_096",
        "9_216": "256",
    },
}


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> list[tuple[int, str, str, str | None]]:
    """Of each fenced block its line, language, text, and why it is not run."""
    text = page.read_text(encoding="utf-8")
    found = []
    for block in FENCE.finditer(text):
        mark = MARK.search(text[: block.start()])
        body = "".join(line[len(block[1]) :] for line in block[3].splitlines(True))
        line = text.count("\n", 0, block.start()) + 2
        found.append((line, block[2], body, mark and mark[1]))
    return found


def python(page: Path) -> list[tuple[int, str, str | None]]:
    return [(line, body, why) for line, language, body, why in blocks(page) if language == "python"]


WITH_PYTHON = [page for page in PAGES if any(why is None for *_, why in python(page))]


def test_what_is_not_run_says_why() -> None:
    reasons = [why for page in PAGES for *_, why in blocks(page) if why is not None]
    assert set(reasons) == NOT_RUN
    texts = [page.read_text(encoding="utf-8") for page in PAGES]
    marks = sum(len(re.findall(r"(?<!`)<!-- *not run", text)) for text in texts)
    assert marks == len(reasons), "a mark stands right before its block"
    assert SMALL.keys() <= {name_of(page) for page in WITH_PYTHON}


@pytest.mark.parametrize("page", WITH_PYTHON, ids=name_of)
def test_python_runs_from_top_to_bottom(page, monkeypatch, tmp_path) -> None:
    in_place_of_smollm2(monkeypatch, tmp_path)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    space: dict[str, object] = {"__name__": "__main__"}
    used, small = set(), SMALL.get(name_of(page), {})
    for line, body, why in python(page):
        if why is not None:
            continue
        for written, run in small.items():
            if written in body:
                used.add(written)
                body = body.replace(written, run)
        # an error names the page and the line
        tree = ast.increment_lineno(ast.parse(body), line - 1)
        exec(compile(tree, str(page), "exec"), space)
    assert used == small.keys(), "nothing is made smaller that is not there"


def commands() -> list[tuple[str, str]]:
    """Every call of `mikernels` in a block or in code of a line, and in what --help shows."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        shown = [body for _, language, body, _ in blocks(page) if language != "python"]
        shown += [code.replace("\n", " ") for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", text)]
        found += [(name_of(page), code) for code in shown]
    for example in (ROOT / "examples").glob("*.py"):
        lines = re.findall(r"^# (mikernels .*)$", example.read_text(encoding="utf-8"), re.M)
        found += [(f"examples/{example.name}", line) for line in lines]
    for where, group in (("mikernels", COMMANDS), ("mikernels bench", BENCH)):
        for name, command in group.commands.items():
            found += [(f"{where} {name} --help", command.help or "")]
    calls = []
    for where, code in found:
        for line in code.replace("\\\n", " ").splitlines():
            call = re.match(r"(?:\$ )?(?:\S*/)?mikernels (.*)", line.strip())
            if call:
                calls.append((where, call[1]))
    return calls


def parse(call: str) -> str | None:
    """What typer says of a command or an option that there is not."""
    # what is left to the reader stands for a value
    call = re.sub(r"\.\.\.|…", "VALUE", call)
    words = shlex.split(re.split(r"[|>;&]", call)[0], comments=True)
    group = COMMANDS
    if words[:1] == ["bench"]:
        # as the command itself does: `bench encode` is `bench run encode`
        group, words = BENCH, words[1:]
        words = words if words and words[0] in group.commands else ["run", *words]
    if not words or words[0].startswith("-"):
        return None
    if words[0] not in group.commands:
        return f"no command {words[0]}"
    command = group.commands[words[0]]
    try:
        command.make_parser(command.context_class(command)).parse_args(words[1:])
    except Exception as error:
        return str(error)
    return None


def test_commands_and_their_options_exist() -> None:
    calls = commands()
    assert len(calls) > 20
    for where, call in calls:
        wrong = parse(call)
        assert wrong is None, f"{where}: mikernels {call}: {wrong}"


@pytest.mark.parametrize(
    ("call", "wrong"),
    [
        ("trian --model x", "no command trian"),
        ("train --modle x", "No such option: --modle"),
        ("bench encode --shapes S1", "No such option: --shapes"),
        ("train --model", "requires an argument"),
    ],
)
def test_what_does_not_exist_is_found(call, wrong) -> None:
    assert wrong in (parse(call) or "")
