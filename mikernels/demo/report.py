# SPDX-License-Identifier: Apache-2.0
"""The demo's page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from markupsafe import Markup

from mikernels import _pages
from mikernels.files import explained, write_atomic


def render(values: dict[str, Any]) -> str:
    """Fill the template; missing values are errors."""
    return _pages.render("demo", "mikernels.demo", "report.html.j2", values, sparkline=sparkline)


def write(path: Path, values: dict[str, Any]) -> None:
    """Render to a file, atomically."""
    page = render(values)
    with explained("demo", "the report", path, "free space or choose another folder"):
        write_atomic(path, page)


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
