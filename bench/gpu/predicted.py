# SPDX-License-Identifier: Apache-2.0
"""The committed predictions, beside what was measured."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from ..harness.rates import DEVICES

FOLDER = Path(__file__).parent.parent / "results"


def path(device: str) -> Path:
    return FOLDER / f"predicted-{device}.json"


@functools.cache
def _cases(device: str) -> dict[tuple[str, ...], dict[str, Any]]:
    # a wheel has no results; a source tree has
    if not path(device).exists():
        return {}
    cases = json.loads(path(device).read_text())["cases"]
    return {tuple(c[name] for name in ("op", "mode", "shape", "dtype")): c for c in cases}


def find(case: dict[str, Any], gpu_name: str) -> dict[str, Any] | None:
    """The prediction for a measured case on a device of that name, None if there is none."""
    device = next((key for key in DEVICES if key.upper() in gpu_name.upper()), None)
    dtype = {"bfloat16": "bf16", "float32": "fp32"}.get(case["dtype"], "")
    if device is None:
        return None
    return _cases(device).get((case["op"], case["mode"], case["shape"]["name"], dtype))


def attach(case: dict[str, Any], facts: dict[str, Any]) -> None:
    """Writes the prediction into the case, for the report and the file."""
    if "gpu" in facts and (found := find(case, facts["gpu"]["name"])):
        case["predicted"] = found


def lines(case: dict[str, Any]) -> list[str]:
    """What was expected, against what came out."""
    found = case.get("predicted")
    if not found:
        return []
    rows = []
    expected = {"ours": found["ms"], **found["rivals_ms"]}
    for record in case["providers"]:
        ms = expected.get(record["name"])
        if ms is not None and record["times_ms"]:
            measured = record["ms"]["p50"]
            rows.append(
                f"{record['name']}: predicted {ms:.3g} ms, measured {measured:.3g} ms "
                f"({measured / ms:.2f}x)"
            )
    parts = ", ".join(f"{p['name']} {p['ms']:.3g}" for p in found["parts"])
    return [*rows, f"ours, predicted: floor {found['floor_ms']:.3g} ms; {parts}"]
