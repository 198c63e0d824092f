# SPDX-License-Identifier: Apache-2.0
"""The variants side by side: their settings, how they are judged, and what the page draws."""

import math
import re
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from demo_cases import check_self_contained, history, report_values, table_rows, token_data
from oracle import randn

from mikernels.demo import report
from mikernels.demo.judge import COLUMNS, Outcome, judge, variants_table
from mikernels.demo.options import DemoOptions
from mikernels.demo.variant_figures import COLOURS, apart, density_multiples, learning_curves
from mikernels.demo.variant_pages import side_by_side
from mikernels.demo.variants import OTHERS, TOPK, VARIANTS, sae_settings
from mikernels.nn import ARCHITECTURES
from mikernels.report.drawing import VARIABLES


def outcomes():
    return [
        Outcome(
            variant=variant,
            rows=history([0.9, 0.5 - 0.01 * i, 0.25 - 0.001 * i]),
            fvu=0.3 + 0.01 * i,
            l0=4.0 + i,
            dead_fraction=0.125 * i,
            density=torch.tensor([0.0, 0.01, 0.01, 0.5], dtype=torch.float64),
            step_ms=10.0 + i,
            peak_extra_bytes=None if i == 1 else (i + 1) << 20,
        )
        for i, variant in enumerate(VARIANTS)
    ]


def test_every_variant_is_one_of_the_library_with_a_folder_a_colour_and_a_paper():
    assert {v.architecture for v in VARIANTS} <= ARCHITECTURES.keys()
    for name in ("architecture", "folder", "title"):
        assert len({getattr(v, name) for v in VARIANTS}) == len(VARIANTS)
    assert {v.architecture for v in VARIANTS} == COLOURS.keys()
    assert len(set(COLOURS.values())) == len(VARIANTS)
    assert all(v.source and v.idea.endswith(".") for v in VARIANTS)
    assert not {"dense", "fused"} & {v.folder for v in OTHERS} and TOPK.folder == "fused"


@pytest.mark.parametrize("k", [1, 20, 300])
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.architecture)
def test_settings_fit_the_variant_and_aim_at_k(variant, k):
    options = DemoOptions.for_data("mnist", k=k)
    settings = sae_settings(variant.architecture, options, 784)
    config = ARCHITECTURES[variant.architecture].config_type(784, **settings)
    assert config.n_features == 784
    assert getattr(config, "k", None) == k or config.target_l0 == k
    assert config.dead_after == options.config.total_tokens // 6


def test_a_variant_is_judged_on_rows_that_were_held_out():
    sae, rows, _ = token_data()
    x = rows["activations"] + 0.1 * randn(600, 12).float()
    held = torch.arange(600) % 5 == 0
    result = {"rows": history([3.0, 2.0, 1.0, 0.5]), "peak_extra_bytes": 5}
    found = judge(TOPK, result, sae, x, held)
    y = sae.decode(sae.encode(x[held])).detach().double()
    t = x[held].double()
    fvu = float((y - t).square().sum() / (t - t.mean(0)).square().sum())
    assert found.fvu == pytest.approx(fvu, rel=1e-12)
    codes = sae.encode(x)
    active = codes.to_dense() != 0
    assert found.l0 == float(active[held].sum(-1).double().mean())
    assert torch.equal(found.density, active.double().mean(0))
    assert (found.dead_fraction, found.step_ms, found.peak_extra_bytes) == (0.25, 40.0, 5)


def test_the_tables_hold_every_variant_and_its_values():
    found = outcomes()
    section = side_by_side(found, DemoOptions(), 100, "tokens")
    assert section["columns"] == COLUMNS
    assert [row[0] for row in section["rows"]] == [v.title for v in VARIANTS]
    assert section["rows"][2] == ("Matryoshka", "0.3200", "6.0", "25.0%", "12", "3 MB")
    assert section["rows"][1][-1] == "not measured"
    table = variants_table(found)
    cells = [list(column.cells) for column in table.columns]
    assert [tuple(row) for row in zip(*cells, strict=True)] == section["rows"]
    assert {one["paper"] for one in section["sources"]} == {v.source for v in VARIANTS}
    assert f"{180 * 1024:,} tokens (180 steps)" in section["notes"][0]


def path_of(drawing, variant, kind):
    """The points of the curve or area in the variant's colour."""
    colour = f"{kind}: var(--{VARIABLES[COLOURS[variant.architecture]]})"
    paths = re.findall(r'<path d="([^"]*)"[^>]*style="([^"]*)"', drawing)
    (found,) = [d for d, style in paths if colour in style and "stroke-width: 0.8" not in style]
    return [tuple(map(float, pair)) for pair in re.findall(r"([-\d.]+) ([-\d.]+)", found)]


@pytest.mark.parametrize("width", [8.6, 3.7])
def test_every_learning_curve_is_drawn_and_labelled(width):
    found = outcomes()
    drawing = learning_curves(found, width)
    scales = []
    for outcome in found:
        assert drawing.count(f">{outcome.variant.title}</text>") == 1
        points = path_of(drawing, outcome.variant, "stroke")
        assert len(points) == len(outcome.rows)
        logs = [math.log(row["fvu"]) for row in outcome.rows]
        (_, first), *_, (_, last) = points
        scales.append((last - first) / (logs[-1] - logs[0]))
        middle = first + scales[-1] * (logs[1] - logs[0])
        assert points[1][1] == pytest.approx(middle, abs=1e-3)
    assert scales == pytest.approx([scales[0]] * len(scales), rel=1e-4) and scales[0] < 0


def test_a_curve_that_starts_far_above_the_mean_alone_leaves_the_others_their_room():
    found = outcomes()
    last = found[-1]
    high = [*found[:-1], replace(last, rows=history([90.0, *(r["fvu"] for r in last.rows[1:])]))]
    ends = []
    for given in (found, high):
        points = path_of(learning_curves(given), TOPK, "stroke")
        ends.append(points[-1][1] - points[0][1])
    assert ends[1] > 0.5 * ends[0]
    said = [side_by_side(o, DemoOptions(), 100, "tokens")["curves_note"] for o in (found, high)]
    assert ["LISTA-Matryoshka starts further" in note for note in said] == [False, True]


def test_labels_that_would_touch_are_moved_apart_and_no_others():
    assert apart([0.0, 100.0, 50.0], 10) == [0.0, 100.0, 50.0]
    assert apart([5.0, 5.0, 80.0], 10) == [0.0, 10.0, 80.0]
    places = [31.0, 3.0, 30.0, 12.0, 29.0, 4.0]
    moved = apart(places, 10)
    assert sorted(range(6), key=moved.__getitem__) == sorted(range(6), key=places.__getitem__)
    assert all(b - a >= 10 - 1e-9 for a, b in pairwise(sorted(moved)))
    assert sum(moved) == pytest.approx(sum(places))


def test_densities_have_the_same_axes():
    first, second, *_ = outcomes()
    second = replace(second, density=torch.tensor([0.01] * 8 + [0.0], dtype=torch.float64))
    drawings = density_multiples([first, second], 1000, "tokens")
    ticks = [re.findall(r">([^<>]+)</text>", drawing) for drawing in drawings]
    assert ticks[0] == ticks[1] and ticks[0][:4] == ["0.1 %", "1 %", "10 %", "100 %"]
    heights = []
    for outcome, drawing in zip((first, second), drawings, strict=True):
        ys = [y for _, y in path_of(drawing, outcome.variant, "fill")]
        heights.append(max(ys) - min(ys))
    assert heights[1] == pytest.approx(4 * heights[0], rel=1e-3)


def test_a_density_of_silent_features_alone_can_be_drawn():
    silent = replace(outcomes()[0], density=torch.zeros(4, dtype=torch.float64))
    (drawing,) = density_multiples([silent], 1000, "tokens")
    assert "nan" not in drawing.lower()


def test_the_page_shows_every_variant():
    found = outcomes()
    values = report_values([])
    section = side_by_side(found, DemoOptions(), 1000, "tokens")
    page = report.render({**values, "variants": section})
    check_self_contained(page)
    assert not re.search(r"\bnan\b", re.sub('data:image/png[^"]*', "", page), re.I)
    assert set(section["rows"]) < set(table_rows(page))
    alone = report.render(values)
    # two sizes of the curves, and small ones in the place of the single density's two
    assert page.count("<svg") == alone.count("<svg") + len(found)
    for outcome in found:
        assert page.count(f"<figcaption><b>{outcome.variant.title}</b>") == 1
        assert f"{outcome.dead_fraction:.1%} dead, L0 {outcome.l0:.1f}" in page
        assert outcome.variant.source in page and outcome.variant.source not in alone
