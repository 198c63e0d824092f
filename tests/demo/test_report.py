# SPDX-License-Identifier: Apache-2.0
"""The page: self-contained, escaped, in the page's colours."""

import json
import re

import jinja2
import pytest
from demo_cases import check_self_contained, report_values, token_data
from full_disk import largest_file

from mikernels.demo import report
from mikernels.report import collect_features
from mikernels.report.drawing import VARIABLES


def test_report_is_self_contained_and_escapes_tokens(tmp_path):
    sae, rows, pieces = token_data()
    features = collect_features(sae, [rows], pieces)
    values = report_values([], views=[features.view(f) for f in (3, 5)])
    report.write(tmp_path / "report.html", values)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    check_self_contained(page)
    assert "<3&>" not in page
    assert "T &lt;1&gt;" in page
    assert page.count("<svg") == 3 * 2
    drawn = json.loads(
        re.search(r'<script type="application/json" id="drawn">(.*)</script>', page)[1]
    )
    assert " <3&>\n" in drawn["words"] and [f["number"] for f in drawn["features"]] == [3, 5]
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_figures_take_the_pages_colours():
    values = report_values([])
    for drawing in values["figures"].values():
        assert "var(--ink)" in drawing
        assert not any(colour in drawing for colour in VARIABLES)
        assert drawing.count('width="100%"') == 2


def test_report_refuses_a_missing_value():
    values = report_values([])
    del values["agreement"]
    with pytest.raises(jinja2.UndefinedError, match="agreement"):
        report.render(values)


def test_a_report_that_cannot_be_written_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "render", lambda values: "x" * 5000)
    with largest_file(1000), pytest.raises(OSError, match="demo: the report must be written to"):
        report.write(tmp_path / "report.html", {})
    assert not list(tmp_path.iterdir())
