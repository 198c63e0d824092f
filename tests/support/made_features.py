"""Made-up features: every kind of text that a token can be, dead ones, rare ones and dense ones."""

import json
import random
from dataclasses import dataclass

import torch

from mikernels.report import Example, FeatureView

# what would break a page, a script or a line of text; the last ones are words
HOSTILE = [
    "<b>&amp;'\"`", "</script>", "<!--<script>", "\u2028", "\u2029", "\ud800", "\x00", "\x1b[31m",
    "\n\n", "\t", "   ", "", "\u202eabc", "\u00a0", "\u05e9\u05dc\u05d5\u05dd", "${x}", "\\u003c",
]  # fmt: skip
WORDS = [
    "", "the", "of", "self", "import", "return", "def", "None", "Paris", "token", "value", "class",
    "function", "list", "string",
]  # fmt: skip


@dataclass
class MadeUp:
    """As `Features`: F of them, of which one in eight is dead."""

    n_features: int
    n_rows: int = 30_000
    examples: int = 6

    def __post_init__(self):
        draw = random.Random(0)
        self.counts = torch.zeros(self.n_features, dtype=torch.int64)
        for f in range(self.n_features):
            if f % 8 != 7:
                self.counts[f] = max(1, int(self.n_rows * 10 ** draw.uniform(-5, 0)))
        alive = self.counts > 0
        self.maxima = torch.where(alive, 1 + self.counts.float().rsqrt() * 30, 0)
        self.labels = [self._word(f, 0) if n else "" for f, n in enumerate(self.counts.tolist())]

    def _word(self, f, i):
        return (
            HOSTILE[f] if i == 0 and f < len(HOSTILE) else f" {WORDS[(f + i) % len(WORDS)]}{f % 97}"
        )

    def _example(self, f, i, value):
        tokens = [WORDS[(f * 7 + i * 3 + j) % len(WORDS)] + " " for j in range(23)]
        if f < len(HOSTILE):
            tokens[3:8] = [HOSTILE[(f + i + j) % len(HOSTILE)] for j in range(5)]
        tokens[14] = self._word(f, 0)
        scores = [0.0] * 23
        scores[12], scores[13], scores[14] = value / 5, value / 2, value
        return Example(tokens, scores, 14, value, f * 50 + i, f, 14, None)

    def view(self, feature):
        if not 0 <= feature < self.n_features:
            raise IndexError(feature)
        count, top = int(self.counts[feature]), float(self.maxima[feature])
        f, n = feature, self.examples
        alive = range(8 if count else 0)
        other = [(f + step) % self.n_features for step in (1, 5, 9)]
        return FeatureView(
            number=f, label=self.labels[f], count=count, n_rows=self.n_rows, maximum=top,
            mean=top / 3, histogram=[max(0, count // (i + 1)) for i in range(20)] if count else [],
            tokens=[(self._word(f, i), 0.5 / (i + 1)) for i in alive[:6]],
            examples=[self._example(f, i, top * (1 - i / 50)) for i in alive[:n]],
            samples=[self._example(f, n + i, top * (0.9 - i / 10)) for i in alive],
            promoted=[(f" up{f % 89}x{i}", 2.5 / (i + 1)) for i in range(10)],
            suppressed=[(f" down{i}", -1.5 / (i + 1)) for i in range(10)],
            similar=[(g, 0.9 - 0.1 * i) for i, g in enumerate(other) if g != f],
        )  # fmt: skip

    def views(self, start, stop):
        return map(self.view, range(start, min(stop, self.n_features)))


def read(folder, name):
    """What a file of data hands over."""
    text = (folder / "data" / f"{name}.js").read_bytes().decode("ascii")
    start, end = f'reportData("{name}",', ");\n"
    assert text.startswith(start) and text.endswith(end) and text.count("\n") == 1
    assert "<" not in text
    return json.loads(text[len(start) : -len(end)])
