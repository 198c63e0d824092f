# SPDX-License-Identifier: Apache-2.0
"""What pages about features are made of: their style and the scripts that draw cards."""

from __future__ import annotations

from importlib import resources

PACKAGE = "mikernels.report"
# one feature, from plain values: `card(feature, words)`
CARDS = ("shared.js", "card.js")
# cards of a page that holds their values itself
ALONE = (*CARDS, "alone.js")
BROWSER = (*CARDS, "store.js", "finder.js", "densities.js", "browser.js")


def style(*names: str) -> str:
    """Files of `templates/`, one after the other; without names the style of all our pages."""
    return "".join(_read(f"templates/{name}") for name in names or ("style.css", "card.css"))


def script(names: tuple[str, ...]) -> str:
    """Files of `scripts/` for a script element."""
    whole = "\n".join(_read(f"scripts/{name}") for name in names)
    # within a string, where alone it may stand, that is the same
    return whole.replace("</script", "<\\/script")


def _read(name: str) -> str:
    return resources.files(PACKAGE).joinpath(name).read_text("utf-8")
