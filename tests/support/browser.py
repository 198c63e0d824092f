# SPDX-License-Identifier: Apache-2.0
"""Pages as people see them: in Chromium without a window, at the width of a desk and of a phone.

Chromium is the system's (`apt-get install chromium`): Playwright's own would have to be downloaded.
"""

import os
import shutil
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import pytest

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="needs Chromium on PATH: apt-get install chromium"
)
# in CSS pixels
SIZES = {"desktop": (1280, 900), "phone": (390, 844)}
# elements that reach past the page's right edge, but for those in a box that scrolls by itself
WIDE = """() => {
  const width = document.documentElement.clientWidth;
  const scrolls = e => e
    && (/auto|scroll/.test(getComputedStyle(e).overflowX) || scrolls(e.parentElement));
  return [...document.body.querySelectorAll('*')]
    .filter(e => e.getBoundingClientRect().right > width + 1 && !scrolls(e.parentElement))
    .map(e => e.outerHTML.slice(0, 120));
}"""


@dataclass
class Tab:
    """A page that is open.

    Attributes:
        page: Playwright's. errors: what it wrote as errors, and exceptions that nobody caught.
        asked: the addresses of all that it asked for, itself first.
    """

    page: object
    errors: list = field(default_factory=list)
    asked: list = field(default_factory=list)

    def check(self, folder=None):
        """No errors, nothing from elsewhere, and no scrolling to the side.

        Args:
            folder: whose files the page may ask for; None: itself alone.
        """
        assert not self.errors, self.errors
        own = urlsplit(self.asked[0])
        for address in map(urlsplit, self.asked):
            assert address.scheme in ("data", "blob") or address[:2] == own[:2], address.geturl()
        if own.scheme == "file":
            files = [a for a in self.asked[1:] if a.startswith("file:")]
            assert all(folder and a.startswith(folder.as_uri() + "/") for a in files), files
        wide = self.page.evaluate("document.documentElement.scrollWidth")
        assert wide <= self.page.viewport_size["width"], self.page.evaluate(WIDE)

    def photograph(self, name, whole=True):
        """A PNG in the folder MIKERNELS_SCREENSHOTS, for people to look at; nothing without it."""
        if folder := os.environ.get("MIKERNELS_SCREENSHOTS"):
            Path(folder).mkdir(parents=True, exist_ok=True)
            self.page.screenshot(path=Path(folder) / f"{name}.png", full_page=whole)


class Browser:
    """Opens pages: a path, or an address of this machine."""

    def __init__(self, chromium):
        self.chromium = chromium

    @contextmanager
    def open(self, where, size="desktop", dark=False):
        """A Tab, closed afterwards; `check()` it."""
        width, height = SIZES[size]
        context = self.chromium.new_context(
            viewport={"width": width, "height": height},
            color_scheme="dark" if dark else "light",
            has_touch=size == "phone",
        )
        # far beyond what a page of these tests takes, on a machine with other work
        context.set_default_timeout(20_000)
        try:
            tab = Tab(context.new_page())
            tab.page.on("pageerror", lambda error: tab.errors.append(str(error)))
            tab.page.on(
                "console",
                lambda said: tab.errors.append(said.text) if said.type == "error" else None,
            )
            tab.page.on("request", lambda request: tab.asked.append(request.url))
            tab.page.goto(where.as_uri() if isinstance(where, Path) else where)
            yield tab
        finally:
            context.close()


@contextmanager
def browser():
    """A Browser, for as long as it is entered. Marks its tests with `needs_chromium`."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"]
        )
        try:
            yield Browser(chromium)
        finally:
            chromium.close()
