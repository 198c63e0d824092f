# SPDX-License-Identifier: Apache-2.0
"""The operators' namespace, `torch.ops.mikernels` unless the build gave another: the one place that
knows it, so that several builds live in one process.

Hugging Face's kernel builder writes this file anew, with the same two names.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch


def _namespace() -> str:
    try:
        facts = json.loads(Path(__file__).with_name("_build.json").read_text())
        return str(facts.get("namespace", "mikernels"))
    except (OSError, ValueError, AttributeError):
        # not installed, or damaged, which `_built.build_facts` says
        return "mikernels"


NAMESPACE = _namespace()
ops: Any = getattr(torch.ops, NAMESPACE)


def add_op_namespace_prefix(name: str) -> str:
    """`name` as the dispatcher knows it: "mikernels::name"."""
    return f"{NAMESPACE}::{name}"
