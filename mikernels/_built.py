# SPDX-License-Identifier: Apache-2.0
"""What the build recorded, and how to build again, read without torch: `mikernels info` must run
where torch does not.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from mikernels.files import read_json

# environments made by uv have no pip. Not by find_spec: setuptools then takes this for a run of pip
_PIP = any(Path(folder, "pip/__init__.py").exists() for folder in sys.path)
REINSTALL = f"{'pip' if _PIP else 'uv pip'} install --force-reinstall --no-deps ."
# `cpu` rather than `auto`: what cannot be built then fails, with the compiler's message
REMEDY = f"MIKERNELS_EXT=cpu {REINSTALL}"
TORCH = "pip install 'torch>=2.10' (which build: pytorch.org), then `mikernels info`"


def torch_fault(error: BaseException) -> str:
    """How torch failed to be imported, if that is what raised `error`; else ""."""
    if isinstance(error, ImportError) and (error.name or "").split(".")[0] == "torch":
        return str(error)
    # a folder that an unfinished removal left: imported, and empty
    torch = sys.modules.get("torch")
    if isinstance(error, AttributeError) and torch and getattr(torch, "__file__", None) is None:
        return f"{error}: {next(iter(torch.__path__))} is not all of it; remove it first"
    trace = error.__traceback__
    while trace is not None:
        frame = trace.tb_frame
        if frame.f_code.co_name == "<module>" and frame.f_globals.get("__name__") == "torch":
            return f"{type(error).__name__}: {error}"
        trace = trace.tb_next
    return ""


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
