# SPDX-License-Identifier: Apache-2.0
"""One self-contained HTML page from plain values: no external resource."""

from __future__ import annotations

import importlib.util
from importlib import resources
from typing import Any


def visible(text: str) -> Any:
    """A token's text as markup, with its line ends and runs of spaces shown."""
    from markupsafe import Markup, escape

    shown = str(escape(text))
    if not text.strip():
        shown = shown.replace(" ", "\u00a0")
        if len(text) > 2:
            shown = "\u00a0\u00a0"
    return Markup(shown.replace("\n", '<i class="nl">\u21b5</i>').replace("\t", "\u21e5"))


def render(where: str, package: str, template: str, values: dict[str, Any], **filters: Any) -> str:
    """Fill a template that lies in a package, and those that it includes; a missing value is an
    error.

    Args:
        where: of the message: the public function.

    Raises:
        ModuleNotFoundError: without the `report` extra.
    """
    try:
        import jinja2
    except ModuleNotFoundError as error:
        raise missing(where, "jinja2") from error
    folder = resources.files(package)
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: folder.joinpath(name).read_text("utf-8")),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"visible": visible, **filters}
    return environment.get_template(template).render(**values)


def missing(where: str, package: str) -> ModuleNotFoundError:
    """What a page needs."""
    return ModuleNotFoundError(
        f"{where}: {package} must be installed; `pip install 'mikernels[report]'`"
    )


def check_installed(where: str) -> None:
    """Before minutes are spent on what a page is to show.

    Raises:
        ModuleNotFoundError: without the `report` extra.
    """
    for package in ("jinja2", "matplotlib"):
        if importlib.util.find_spec(package) is None:
            raise missing(where, package)
