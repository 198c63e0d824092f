# SPDX-License-Identifier: Apache-2.0
"""The processor's name and features, and memory, as the system tells them."""

from __future__ import annotations

import platform
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
MEMINFO = Path("/proc/meminfo")
STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")
# a container's limit and what it uses, of cgroup v2
CGROUP = Path("/sys/fs/cgroup")


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


def _kibibytes(path: Path, field: str) -> int | None:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith(f"{field}:")]
    return int(found[0]) * 1024 if found else None


def resident_bytes(field: str) -> int | None:
    """VmRSS or VmHWM (its peak) of this process; None where there is no /proc."""
    return _kibibytes(STATUS, field)


def reset_peak() -> bool:
    """Start VmHWM again at the present resident set; False where the kernel does not let us."""
    try:
        CLEAR_REFS.write_text("5")
    except OSError:
        return False
    return True


def available_memory() -> int | None:
    """Bytes that a process may still take without swapping, a container's limit included."""
    free = _kibibytes(MEMINFO, "MemAvailable")
    try:
        limit = (CGROUP / "memory.max").read_text().strip()
        used = int((CGROUP / "memory.current").read_text())
    except (OSError, ValueError):
        return free
    if not limit.isdigit() or free is None:
        return free
    return min(free, max(0, int(limit) - used))
