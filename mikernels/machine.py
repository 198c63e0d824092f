# SPDX-License-Identifier: Apache-2.0
"""The processor's name and features, as the system tells them."""

from __future__ import annotations

import platform
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")


def _first_processor() -> dict[str, str]:
    """The fields of the first processor in /proc/cpuinfo; none where there is no such file."""
    fields: dict[str, str] = {}
    try:
        # the kernel makes the text as it is read: the other processors' cost time on large machines
        with CPUINFO.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                name, colon, value = line.partition(":")
                if colon:
                    fields[name.strip()] = value.strip()
                elif fields:
                    break
    except OSError:
        return {}
    return fields


def cpu_name() -> str:
    """The processor's model, or its architecture where the system names none."""
    named = _first_processor().get("model name")
    return named or platform.processor() or platform.machine()


def cpu_flags() -> frozenset[str]:
    """Features such as "avx2" (x86) or "asimd" (Arm); none where the system tells none."""
    fields = _first_processor()
    return frozenset((fields.get("flags") or fields.get("Features") or "").split())
