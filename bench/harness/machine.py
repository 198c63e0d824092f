# SPDX-License-Identifier: Apache-2.0
"""The machine's facts and its measured ceilings."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import mikernels
from mikernels import _ext
from mikernels.machine import cpu_flags, cpu_name

from ..gpu import gpu
from ..gpu.device import Cpu, Cuda

# of the processor's flags, those that decide speed here
FLAGS = re.compile(r"^(avx|fma|f16c|amx|bmi2|sve|asimd|neon|avx512.*|avx_vnni|avx2)")


def facts(device: Cpu | None = None) -> dict[str, Any]:
    """Everything that a number needs beside it; no host names and no paths."""
    found = {
        "cpu": cpu_name(),
        "flags": sorted(flag for flag in cpu_flags() if FLAGS.match(flag)),
        "cores": os.cpu_count(),
        "memory_gb": _memory_gb(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
        "mikernels": mikernels.__version__,
        "git": _git(),
        "level": mikernels.cpu_level(),
        "build": _ext.build_facts(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "load": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
    }
    return found | {"gpu": gpu.facts(device)} if isinstance(device, Cuda) else found


def _memory_gb() -> float | None:
    names = getattr(os, "sysconf_names", {})
    if "SC_PHYS_PAGES" not in names:
        return None
    return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)


def _git() -> dict[str, Any] | None:
    """Commit of the source tree that is imported; None for an installed wheel."""
    root = Path(mikernels.__file__).parent.parent

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *words], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        # an environment inside somebody's repository is not our source
        if Path(git("rev-parse", "--show-toplevel")) != root:
            return None
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return None


def peaks(device: Cpu | None = None) -> dict[str, dict[str, float | None]]:
    """Ceilings measured now, for one thread and for all of torch's threads.

    fma_gflops (fp32), tile_gflops (AMX bf16), madd16_gops and dot8_gops (products of int16 and of
    bytes), copy_gbs, read_gbs; a unit that is absent is None. Without the extension: torch's own
    sgemm and copy. On a GPU: the one entry "gpu", of gpu.py.
    """
    if isinstance(device, Cuda):
        return {"gpu": gpu.peaks(device)}
    return {"one": _peaks(False), "all": _peaks(True)}


def _peaks(all_threads: bool) -> dict[str, float | None]:
    measured = _ext.measure_peaks(all_threads)
    if measured is not None:
        return {name: value or None for name, value in measured.items()}
    threads = torch.get_num_threads()
    torch.set_num_threads(threads if all_threads else 1)
    try:
        a, b = torch.randn(2, 1536, 1536)
        source, target = torch.randn(2, 1 << 24)
        return {
            "fma_gflops": 2 * 1536**3 / _best(lambda: a @ b) / 1e9,
            "madd16_gops": None,
            "dot8_gops": None,
            "tile_gflops": None,
            "copy_gbs": 2 * source.nbytes / _best(lambda: target.copy_(source)) / 1e9,
            "read_gbs": source.nbytes / _best(lambda: source.sum()) / 1e9,
        }
    finally:
        torch.set_num_threads(threads)


def _best(function: Callable[[], object]) -> float:
    times = []
    for _ in range(5):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def screen_gflops(peaks_all: dict[str, float | None], level: str | None) -> float | None:
    """The ceiling of screening at a level: AMX tiles, else products of bytes, else of int16."""
    if level == "amx":
        return peaks_all["tile_gflops"]
    # results from before the coarse screen have no dot8_gops
    return peaks_all.get("dot8_gops") or peaks_all["madd16_gops"]
