# SPDX-License-Identifier: Apache-2.0
"""A folder of pages about an SAE's features, which opens from a disk without a server."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mikernels import _pages
from mikernels.evaluate import Reconstruction, Spliced
from mikernels.files import finite
from mikernels.report.chunks import PER_CHUNK, Data
from mikernels.report.folder import MARKER, PAGE, Writer, new_report
from mikernels.report.page import BROWSER, PACKAGE, script, style
from mikernels.report.quality import reconstruction_table, spliced_table
from mikernels.report.views import Features, FeatureView

NAME = "write_report"


def write_report(
    features: Features,
    folder: str | Path,
    *,
    title: str = "Features of a sparse autoencoder",
    numbers: Sequence[int] | None = None,
    reconstruction: Reconstruction | None = None,
    spliced: Spliced | None = None,
    metrics: Sequence[Mapping[str, Any]] = (),
    known: Mapping[str, str] | None = None,
    command: str = "",
    progress: Callable[[int], None] = lambda _: None,
) -> Path:
    """Write `folder/index.html`: features to search, sort, filter and look at, one at a time.

    The folder is whole or absent; a former report there is replaced when this one is complete. Of F
    features a page holds three numbers and a few tokens each, and loads the rest in files of 128
    features as they are looked at: memory O(F) here and there.

    Args:
        features: what is known of each; see `collect_features`.
        folder: absent, empty, or a former report.
        title: of the page.
        numbers: the features to show, in this order; None: all.
        reconstruction, spliced: what judges found, to be shown above the features.
        metrics: rows of a training run's `metrics.jsonl`, for its learning curves.
        known: what was done, name by name. command: that makes the report again.
        progress: called with the number of features written since the call before.

    Returns:
        The page's path.

    Raises:
        ModuleNotFoundError: without the `report` extra.
        ValueError: a number twice, or none. IndexError: a number that is not in 0..F-1.
        FileExistsError: the folder holds something else. OSError: it cannot be written.

    Example:
        >>> features = collect_features(sae, batches, pieces)  # doctest: +SKIP
        >>> write_report(features, "out/report")  # doctest: +SKIP
    """
    folder = Path(folder)
    chosen = _chosen(numbers, features.n_features)
    _pages.check_installed(NAME)
    values: dict[str, Any] = {
        "title": title,
        "lede": _lede(features, chosen),
        "headline": _headline(features, reconstruction, spliced),
        "tables": _tables(reconstruction, spliced),
        "figures": _figures(metrics),
        "command": command,
        "facts": list((known or {}).items()),
        "style": style("style.css", "card.css", "browser.css"),
        "script": script(BROWSER),
    }
    with new_report(folder, NAME) as writer:
        data = Data(writer, features.n_rows)
        for n, view in enumerate(_views(features, chosen), start=1):
            data.add(view)
            if n % PER_CHUNK == 0:
                progress(PER_CHUNK)
        values["promoted"] = data.finish()
        progress(len(chosen) % PER_CHUNK)
        writer.write(PAGE, _pages.render(NAME, PACKAGE, "templates/index.html.j2", values))
        _write_marker(writer, title, features, chosen, reconstruction, spliced, known or {})
    return folder / PAGE


def _chosen(numbers: Sequence[int] | None, n: int) -> Sequence[int]:
    if numbers is None:
        return range(n)
    if not numbers or len({*numbers}) < len(numbers):
        raise ValueError(f"{NAME}: numbers must be features, each once, got {list(numbers)[:8]}")
    for number in numbers:
        if not 0 <= number < n:
            raise IndexError(f"{NAME}: numbers must be in 0..{n - 1} (F), got {number}")
    return numbers


def _views(features: Features, chosen: Sequence[int]) -> Iterator[FeatureView]:
    if isinstance(chosen, range):
        for start in range(0, len(chosen), PER_CHUNK):
            yield from features.views(start, start + PER_CHUNK)
    else:
        yield from map(features.view, chosen)


def _lede(features: Features, chosen: Sequence[int]) -> str:
    n = features.n_features
    which = f"{n:,}" if len(chosen) == n else f"{len(chosen):,} of {n:,}"
    return f"{which} features, and what they do on {features.n_rows:,} tokens."


def _headline(
    features: Features, found: Reconstruction | None, spliced: Spliced | None
) -> list[dict[str, str]]:
    items = []
    if found is not None:
        items += [
            {"value": f"{1 - found.fvu:.1%}", "label": "of the variance explained"},
            {"value": f"{found.l0:.1f}", "label": "features active on a token (L0)"},
        ]
    if spliced is not None:
        label = "of the loss recovered, against mean ablation"
        value = spliced.recovered.value
        items.append({"value": f"{value:.1%}" if value == value else "–", "label": label})
    alive = int((features.counts > 0).sum())
    label = f"of {features.n_features:,} features fire here"
    items.append({"value": f"{alive / features.n_features:.1%}", "label": label})
    return items


def _tables(found: Reconstruction | None, spliced: Spliced | None) -> list[Any]:
    tables = []
    if found is not None:
        random = None if spliced is None else spliced.random_reconstruction
        tables.append(reconstruction_table(found, random))
    if spliced is not None:
        tables.append(spliced_table(spliced))
    return tables


def _figures(metrics: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    if len(metrics) < 2:
        return []
    from mikernels.report.drawing import HALF, both
    from mikernels.report.figures import learning_curves

    return [
        {
            "title": "Training",
            "drawing": both(lambda width: learning_curves(metrics, width), HALF),
            "note": "Of each training batch: variance unexplained, active features per token, and "
            "the share of features that have not fired for long.",
        }
    ]


def _write_marker(
    writer: Writer,
    title: str,
    features: Features,
    chosen: Sequence[int],
    reconstruction: Reconstruction | None,
    spliced: Spliced | None,
    known: Mapping[str, str],
) -> None:
    """`report.json`, last: which files are the report's, and its figures."""
    value = {
        "mikernels_report": 1,
        "title": title,
        "n_features": features.n_features,
        "shown": len(chosen),
        "tokens": features.n_rows,
        "known": dict(known),
        "reconstruction": None if reconstruction is None else reconstruction.to_dict(),
        "spliced": None if spliced is None else spliced.to_dict(),
        "files": list(writer.files),
    }
    writer.write(MARKER, json.dumps(finite(value), indent=1, allow_nan=False) + "\n")
