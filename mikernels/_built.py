# SPDX-License-Identifier: Apache-2.0
"""What the build recorded, read without torch: `mikernels info` must run where torch does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mikernels.files import read_json

TORCH = "pip install 'torch>=2.10' (which build: pytorch.org), then `mikernels info`"


def build_facts() -> dict[str, Any]:
    """What setup.py recorded when it built (or did not build) the extension."""
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
