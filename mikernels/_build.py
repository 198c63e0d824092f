# SPDX-License-Identifier: Apache-2.0
"""What setup.py recorded when it built (or did not build) the extension, and how to mend it."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mikernels.files import read_json

# environments made by uv have no pip
INSTALL = "pip install" if find_spec("pip") else "uv pip install"
# `cpu` rather than `auto`: what cannot be built then fails, with the compiler's message
REMEDY = f"MIKERNELS_EXT=cpu {INSTALL} --force-reinstall --no-deps ."


def build_facts() -> dict[str, Any]:
    """The facts of the build; without any, those of none, with the reason."""
    path = Path(__file__).with_name("_build.json")
    if not path.exists():
        return {"extension": False, "reason": "not installed: run `pip install -e .`"}
    fix = "reinstall mikernels"
    try:
        facts = read_json(path, "mikernels", "the facts of a build", fix)
    except (OSError, ValueError) as error:
        return {"extension": False, "reason": str(error)}
    if not isinstance(facts, dict) or not isinstance(facts.get("cuda", {}), dict):
        return {"extension": False, "reason": f"{path} must hold the facts of a build; {fix}"}
    return facts
