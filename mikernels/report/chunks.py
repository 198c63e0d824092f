# SPDX-License-Identifier: Apache-2.0
"""A report's data: scripts that hand over JSON, as a page opened from a disk may run scripts and
may not read files.

`index.js` holds three numbers and some tokens of every feature, `promoted.js` what search compares
promoted tokens with, and `features-00000.js`, ... all about `PER_CHUNK` features each. All is
ASCII: a line separator, half of a surrogate pair or `</script>` in a token is an escape there.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from mikernels.report.folder import DATA, Writer
from mikernels.report.views import Example, FeatureView

# some 0.4 MB, read from a disk within a frame or two
PER_CHUNK = 128
# tokens by which a feature is known in lists, and found
TOPS, PROMOTED = 6, 10
NONE = 0xFFFFFFFF


class Words(dict[str, int]):
    """Texts by number, in the order in which they were asked for; most of the time of a report is
    spent here, and a hit runs no Python."""

    def __missing__(self, text: str) -> int:
        self[text] = number = len(self)
        return number


def script(name: str, value: Any) -> str:
    """`data/<name>.js`."""
    return f'reportData("{name}",{dumped(value)});\n'


def dumped(value: Any) -> str:
    """JSON without spaces, in ASCII; safe within a script element too."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c")


def _short(value: float, digits: int = 4) -> float | None:
    """Digits enough to be read: they are most of a file."""
    return float(f"{value:.{digits}g}") if math.isfinite(value) else None


def _example(found: Example, words: Words) -> list[Any]:
    """Tokens, (place, value) of those that are active, the peak, and where it is from."""
    fires: list[Any] = []
    for place, score in enumerate(found.scores):
        if score:
            fires += [place, _short(score)]
    where = f"row {found.row:,}, window {found.window:,}"
    if found.position is not None:
        where += f", position {found.position:,}"
    if found.document is not None:
        where += f", document {found.document:,}"
    return [[words[token] for token in found.tokens], fires, found.peak, where]


def _groups(view: FeatureView, words: Words) -> list[dict[str, Any]]:
    """The strongest examples, then samples of each quarter of the activations."""
    groups = [("Strongest", view.examples)]
    quarters: list[list[Example]] = [[], [], [], []]
    for sample in view.samples:
        quarters[min(3, int(4 * sample.value / view.maximum))].append(sample)
    for quarter in (3, 2, 1, 0):
        low, high = 25 * quarter, 25 * quarter + 25
        title = f"Samples of {low} to {high} % of the largest activation"
        groups.append((title, quarters[quarter]))
    return [
        {"title": title, "examples": [_example(one, words) for one in examples]}
        for title, examples in groups
        if examples
    ]


def plain(view: FeatureView, words: Words) -> dict[str, Any]:
    """A feature as `card.js` takes it."""

    def scored(rows: Iterable[tuple[str, float]]) -> list[list[Any]]:
        return [[words[text], _short(score)] for text, score in rows]

    return {
        "number": view.number,
        "count": view.count,
        "density": _short(view.density, 6),
        "maximum": _short(view.maximum),
        "mean": _short(view.mean),
        "histogram": view.histogram,
        "tokens": scored(view.tokens),
        "promoted": scored(view.promoted),
        "suppressed": scored(view.suppressed),
        "similar": [[number, _short(cosine)] for number, cosine in view.similar],
        "groups": _groups(view, words),
    }


def _packed(values: Any, kind: Any) -> str:
    """Little-endian numbers, as `numbers` of `store.js` reads them."""
    return base64.b64encode(np.asarray(values, dtype=kind).tobytes()).decode()


class Data:
    """Writes features in their order, a chunk at a time; the index last.

    Args:
        rows: tokens that were read. unit: what they are called.
    """

    def __init__(self, writer: Writer, rows: int, unit: str = "tokens"):
        self._writer, self._rows, self._unit = writer, rows, unit
        self._words = Words()
        self._numbers: list[int] = []
        self._counts: list[int] = []
        self._maxima: list[float] = []
        self._tops: list[int] = []
        self._promoted: list[int] = []
        self._chunk: list[dict[str, Any]] = []
        self._chunk_words = Words()

    def add(self, view: FeatureView) -> None:
        """One feature more."""
        self._numbers.append(view.number)
        self._counts.append(view.count)
        self._maxima.append(view.maximum)
        self._tops += self._named(view.tokens, TOPS)
        self._promoted += self._named(view.promoted, PROMOTED)
        self._chunk.append(plain(view, self._chunk_words))
        if len(self._chunk) == PER_CHUNK:
            self._flush()

    def _named(self, rows: Sequence[tuple[str, float]], width: int) -> list[int]:
        found = [self._words[text] for text, _ in rows[:width]]
        return found + [NONE] * (width - len(found))

    def _flush(self) -> None:
        number = (len(self._numbers) - 1) // PER_CHUNK
        value = {"words": list(self._chunk_words), "features": self._chunk}
        self._write(f"features-{number:05d}", value)
        self._chunk, self._chunk_words = [], Words()

    def finish(self) -> bool:
        """Write the rest; whether there are promoted tokens."""
        if self._chunk:
            self._flush()
        promoted = any(token != NONE for token in self._promoted)
        if promoted:
            value = {"width": PROMOTED, "tokens": _packed(self._promoted, "<u4")}
            self._write("promoted", value)
        index = {
            "rows": self._rows,
            "unit": self._unit,
            "per_chunk": PER_CHUNK,
            "numbers": _packed(self._numbers, "<u4"),
            "counts": _packed(self._counts, "<f8"),
            "maxima": _packed(self._maxima, "<f4"),
            "top_width": TOPS,
            "tops": _packed(self._tops, "<u4"),
            "promoted": promoted,
            "words": list(self._words),
        }
        self._write("index", index)
        return promoted

    def _write(self, name: str, value: Any) -> None:
        self._writer.write(f"{DATA}/{name}.js", script(name, value))
