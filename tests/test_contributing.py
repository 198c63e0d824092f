# SPDX-License-Identifier: Apache-2.0
"""What CONTRIBUTING.md, CITATION.cff and the issue forms say is what there is."""

import re
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

import mikernels

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
# whole operators of every kind: with CUDA, products of pairs, a screen of its own
STEMS = {
    "row_topk": "select",
    "block_norms": "pairs",
    "positional_dot": "pairs",
    "groupmax_encode": "sae",
}
SUFFIXES = (".py", ".cpp", ".h", ".cu", ".md")


def table(heading):
    """The rows below a heading, as their cells."""
    section = re.split(r"\n#+ ", TEXT.split(f"# {heading}\n")[1])[0]
    rows = [line for line in section.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows[1:]]


def names(cell):
    return re.findall(r"`([^`]+)`", cell)


def tracked():
    """Sources and pages, as paths from the root."""
    for folder in ("mikernels", "csrc", "kernels", "bench", "tests", "docs", "."):
        for path in (ROOT / folder).glob("*" if folder == "." else "**/*"):
            name = path.relative_to(ROOT).as_posix()
            if path.suffix in SUFFIXES and path != Path(__file__) and "bench/results" not in name:
                yield name


FILES = sorted(tracked())
OPERATOR = [
    (pattern, when) for cell, when in table("Every file of an operator") for pattern in names(cell)
]


@pytest.mark.parametrize("stem", STEMS)
def test_the_files_of_an_operator(stem):
    folder = STEMS[stem]
    patterns = {p.replace("FOLDER", folder).replace("STEM", stem): when for p, when in OPERATOR}
    known = {f: [p for p in patterns if fnmatchcase(f, p)] for f in FILES}
    # its own files bear its name
    assert [f for f in FILES if stem in Path(f).stem and not known[f]] == []
    # its name in a schema has a _ more if it writes to an operand
    mention = {f for f in FILES if re.search(rf"\b{stem}_?\b", (ROOT / f).read_text("utf-8"))}
    found = {p for f in FILES for p in known[f] if f in mention or stem in f}
    wanted = {p for p, when in patterns.items() if when == "always" or f"`{folder}`" in when}
    assert wanted - found == set()
    if stem == "row_topk":
        return  # others are made of it
    # whoever uses an operator lies above it
    users = ("mikernels/", "docs/", "CONTRIBUTING.md")
    assert {f for f in mention if not known[f] and not f.startswith(users)} == set()
    assert not any(f.startswith("mikernels/ops/") for f in mention if not known[f])


def test_every_row_of_the_table_is_true_of_an_operator():
    for pattern, _ in OPERATOR:
        forms = {pattern.replace("FOLDER", f).replace("STEM", s) for s, f in STEMS.items()}
        assert any(fnmatchcase(f, form) for f in FILES for form in forms), pattern


def test_the_rooms_are_the_folders():
    named = {name for cell, _ in table("Where things live") for name in names(cell)}
    rooms = {name.removeprefix("mikernels/").rstrip("/") for name in named}
    inside = {p.parent.name for p in (ROOT / "mikernels").glob("*/__init__.py")}
    beside = {p.name for p in ROOT.glob("[!.]*/") if p.is_dir()} - {"mikernels"}
    # what is built
    beside -= {"build", "dist", "out"} | {p.name for p in ROOT.glob("*.egg-info")}
    modules = {p.name for p in (ROOT / "mikernels").glob("[!_]*.py")}
    assert {room for room in rooms if "*" not in room} == inside | beside | modules


def test_what_the_text_points_to_exists():
    rooms = "mikernels|csrc|kernels|bench|tests|docs"
    paths = re.findall(rf"`((?:{rooms})/[\w./]+\.\w+)`", TEXT)
    assert len(paths) > 30
    missing = [p for p in paths if not re.search("STEM|NAME", p) and not (ROOT / p).is_file()]
    assert missing == []


def test_citation_and_issue_form_are_valid():
    yaml = pytest.importorskip("yaml")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["version"] == mikernels.__version__
    form = yaml.safe_load((ROOT / ".github/ISSUE_TEMPLATE/bug.yml").read_text(encoding="utf-8"))
    assert {"name", "description", "body"} <= form.keys()
    asked = {part["id"]: part for part in form["body"]}
    assert len(asked) == len(form["body"])
    assert all(
        part["type"] == "textarea" and part["attributes"]["label"] for part in asked.values()
    )
    assert asked["info"]["attributes"]["label"] == "mikernels info --json"
    assert asked["info"]["validations"]["required"] is True
