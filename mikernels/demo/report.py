# SPDX-License-Identifier: Apache-2.0
"""The demo's page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mikernels import _pages
from mikernels.files import explained, write_atomic
from mikernels.report import page
from mikernels.report.chunks import Words, dumped, plain


def render(values: dict[str, Any]) -> str:
    """Fill the template; missing values are errors.

    Args:
        values: `views` are the features whose cards a script draws.
    """
    words = Words()
    features = [plain(view, words) for view in values["views"]]
    drawn = {"features": features, "words": list(words), "folder": values["folder"]}
    more = {"style": page.style(), "script": page.script(page.ALONE), "drawn": dumped(drawn)}
    return _pages.render("demo", "mikernels.demo", "report.html.j2", {**values, **more})


def write(path: Path, values: dict[str, Any]) -> None:
    """Render to a file, atomically."""
    made = render(values)
    with explained("demo", "the report", path, "free space or choose another folder"):
        write_atomic(path, made)
