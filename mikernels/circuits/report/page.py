# SPDX-License-Identifier: Apache-2.0
"""The page: its parts in their templates, one style, and a script where a part is drawn by one.

What a script draws is plain values in the page, drawn with d3 (BSD-3-Clause), of which the package
mpld3 brings 0.24 MB as one file. Nothing is asked for from anywhere, which the page's own policy
forbids.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from mikernels import _pages
from mikernels.circuits.report.parts import Part
from mikernels.files import explained, finite, write_atomic

PACKAGE = "mikernels.circuits.report"
LIBRARY = "d3.v5.min.js"
# kind of part -> what draws it
SCRIPTS = {
    "graph": ("graph_paths.js", "graph_layout.js", "graph.js"),
    "patterns": ("patterns.js",),
    "curves": ("curves.js",),
}
# that want more width than text does
BROAD = ("graph", "patterns")
# more parts than a reader finds by scrolling
CONTENTS = 6


def _read(name: str) -> str:
    return resources.files(PACKAGE).joinpath(name).read_text("utf-8")


def _library(where: str) -> str:
    """d3, read from mpld3's folder: importing that would import matplotlib."""
    spec = importlib.util.find_spec("mpld3")
    path = (
        None if spec is None or spec.origin is None else Path(spec.origin).parent / "js" / LIBRARY
    )
    if path is None or not path.is_file():
        raise _pages.missing(where, f"mpld3 (with {LIBRARY})")
    return path.read_text("utf-8")


def check_installed(where: str) -> None:
    """Before minutes are spent on what a page is to show.

    Raises:
        ModuleNotFoundError: without the `report` extra.
    """
    if importlib.util.find_spec("jinja2") is None:
        raise _pages.missing(where, "jinja2")
    _library(where)


def _script(where: str, kinds: Sequence[str]) -> str:
    """Of a page with these kinds of parts; empty for one that needs none."""
    needed = [name for kind in SCRIPTS if kind in kinds for name in SCRIPTS[kind]]
    if not needed:
        return ""
    own = "\n".join(_read(f"scripts/{name}") for name in ("shared.js", *needed))
    whole = f'{_library(where)}\n(() => {{\n"use strict";\n{own}}})();\n'
    # within a string, where alone it may stand, that is the same
    return whole.replace("</script", "<\\/script")


def write(where: str, title: str, lede: str, parts: Sequence[Part], path: str | Path | None) -> str:
    """The page; also in a file where there is a path.

    Raises:
        ModuleNotFoundError: without the `report` extra. OSError: it cannot be written.
    """
    script = _script(where, [part["kind"] for part in parts])
    values = {
        "title": title,
        "lede": lede,
        "parts": parts,
        "contents": len(parts) >= CONTENTS,
        "broad": any(part["kind"] in BROAD for part in parts),
        "style": _read("templates/style.css"),
        "script": script,
        # by the number of the part
        "drawn": {i: finite(part["drawn"]) for i, part in enumerate(parts) if "drawn" in part},
    }
    made = _pages.render(where, PACKAGE, "templates/page.html.j2", values)
    if path is not None:
        path = Path(path)
        with explained(where, "the page", path, "free space or choose another folder"):
            write_atomic(path, made)
    return made
