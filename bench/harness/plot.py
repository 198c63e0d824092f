# SPDX-License-Identifier: Apache-2.0
"""A picture from a results file alone: every provider's speed-up over the baseline, by case."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from mikernels.files import explained, write_atomic

from . import report
from .spec import sizes_of

FORMATS = (".svg", ".png")
OURS, OTHERS, INK = "#0b7285", "#adb5bd", "#343a40"


def draw(results: dict[str, Any], out: Path) -> None:
    """Writes the plot; the format follows the suffix (.svg or .png).

    Raises:
        ValueError: for another suffix, or results without a timed case.
        ImportError: without matplotlib.
    """
    if out.suffix not in FORMATS:
        raise ValueError(f"bench plot: --out must end in {' or '.join(FORMATS)}, got {out.name!r}")
    # the baseline alone compares nothing
    cases = [case for case in results["cases"] if len(_rows(case)) > 1]
    if not cases:
        raise ValueError(
            "bench plot: the results hold no case with two timed providers; measure one first"
        )
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError(
            "bench plot: matplotlib is not installed; run `pip install 'mikernels[report]'`"
        ) from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    heights = [len(_rows(case)) + 1.6 for case in cases]
    # text stays text in the SVG, and equal results give equal bytes
    with pyplot.rc_context({"svg.fonttype": "none", "svg.hashsalt": "mikernels", "font.size": 9}):
        # laid out by hand: matplotlib's solver gives other last digits each time for many axes
        tall, gap = 0.3 * sum(heights) + 0.6 * len(cases) + 0.4, 0.6
        figure, axes = pyplot.subplots(
            len(cases), 1, figsize=(8, tall), squeeze=False, height_ratios=heights
        )
        average = (tall - 0.9 - gap * (len(cases) - 1)) / len(cases)
        figure.subplots_adjust(
            left=0.2, right=0.97, bottom=0.3 / tall, top=1 - 0.6 / tall, hspace=gap / average
        )
        for axis, case in zip(axes[:, 0], cases, strict=True):
            _draw_case(axis, case)
        figure.suptitle(
            _conditions(results), fontsize=8, color=INK, x=0.01, y=1 - 0.1 / tall, ha="left"
        )
        metadata = {"Date": None} if out.suffix == ".svg" else {}
        drawn = io.BytesIO()
        figure.savefig(drawn, dpi=144, metadata=metadata, format=out.suffix[1:] or "png")
        pyplot.close(figure)
    with explained("bench plot", "the plot", out, "free space or choose another --out"):
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(out, drawn.getvalue())


def _rows(case: dict[str, Any]) -> list[tuple[str, dict[str, float], float]]:
    rows = []
    for record in case["providers"]:
        ratio = report.ratio(case, record["name"])
        if ratio:
            rows.append((record["name"], ratio, record["ms"]["p50"]))
    return sorted(rows, key=lambda row: row[1]["ratio"])


def _draw_case(axis: Any, case: dict[str, Any]) -> None:
    rows = _rows(case)
    values = [ratio["ratio"] for _, ratio, _ in rows]
    errors = [
        [ratio["ratio"] - ratio["low"] for _, ratio, _ in rows],
        [ratio["high"] - ratio["ratio"] for _, ratio, _ in rows],
    ]
    # a resampled interval need not contain the estimate itself
    errors = [[max(0.0, e) for e in side] for side in errors]
    colours = [OURS if name.split(":")[0] == "ours" else OTHERS for name, _, _ in rows]
    axis.barh(
        [name for name, _, _ in rows],
        values,
        xerr=errors,
        color=colours,
        height=0.7,
        error_kw={"elinewidth": 1, "ecolor": INK},
    )
    # an interval of a noisy run must not flatten every bar
    limit = min(1.35 * max(ratio["high"] for _, ratio, _ in rows), 2 * max(values))
    for place, (_, ratio, ms) in enumerate(rows):
        axis.annotate(
            f"{ratio['ratio']:.2f}x, {ms:.3g} ms",
            (min(max(ratio["ratio"], ratio["high"]), 0.78 * limit), place),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color=INK,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
        )
    shape = case["shape"]
    axis.set_title(
        f"{case['op']}, {case['mode']}, {shape['name']}: {sizes_of(shape)}, {case['dtype']} "
        f"(speed-up over {case['baseline']})",
        fontsize=9,
        loc="left",
    )
    axis.axvline(1.0, color=INK, linewidth=0.8, linestyle=":")
    axis.set_xlim(0, limit)
    axis.set_ylim(-0.6, len(rows) - 0.4)
    axis.spines[["top", "right"]].set_visible(False)


def _conditions(results: dict[str, Any]) -> str:
    machine = results["machine"]
    level = f"level {machine['level']}" if machine["level"] else "no extension"
    git = machine["git"]
    commit = f" ({git['commit'][:9]}{', dirty' if git['dirty'] else ''})" if git else ""
    gpu = machine.get("gpu")
    if gpu:
        return (
            f"{gpu['name']}, driver {gpu['driver']}, triton {gpu['triton']}; torch "
            f"{machine['torch']}, mikernels {machine['mikernels']}{commit}; {machine['date'][:10]}"
        )
    return (
        f"{machine['cpu']}, {machine['torch_threads']} threads, {level}; torch {machine['torch']}, "
        f"mikernels {machine['mikernels']}{commit}; {machine['date'][:10]}"
    )
