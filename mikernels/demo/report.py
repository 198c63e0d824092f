# SPDX-License-Identifier: Apache-2.0
"""One self-contained HTML page from plain values: no script, no external resource."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from mikernels.files import explained, write_atomic


def render(values: dict[str, Any]) -> str:
    """Fill the template; missing values are errors."""
    source = resources.files("mikernels.demo").joinpath("report.html.j2").read_text()
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["visible"] = visible
    environment.filters["sparkline"] = sparkline
    return environment.from_string(source).render(**values)


def write(path: Path, values: dict[str, Any]) -> None:
    """Render to a file, atomically."""
    page = render(values)
    with explained("demo", "the report", path, "free space or choose another folder"):
        write_atomic(path, page)


def visible(piece: str) -> Markup:
    """A token's text with its line ends and runs of spaces shown."""
    text = str(escape(piece))
    if not piece.strip():
        text = text.replace(" ", "\u00a0")
        if len(piece) > 2:
            text = "\u00a0\u00a0"
    return Markup(text.replace("\n", '<i class="nl">\u21b5</i>').replace("\t", "\u21e5"))


def sparkline(bins: list[float]) -> Markup:
    """A small inline histogram, heights by square root so that the rare strong end shows."""
    top = max(max(bins), 1.0) ** 0.5
    bars = "".join(
        f'<rect x="{4 * i}" y="{22 - 22 * n**0.5 / top:.1f}" width="3.4" '
        f'height="{22 * n**0.5 / top:.1f}"/>'
        for i, n in enumerate(bins)
    )
    width = 4 * len(bins)
    return Markup(f'<svg class="spark" viewBox="0 0 {width} 22" aria-hidden="true">{bars}</svg>')
