# SPDX-License-Identifier: Apache-2.0
"""A GPU's facts and its measured ceilings."""

from __future__ import annotations

import importlib.util
import subprocess
from functools import partial
from typing import Any

import torch

from .device import Cuda

# what nvidia-smi is asked for; it only reads
SMI = {
    "driver": "driver_version",
    "sm_mhz": "clocks.sm",
    "sm_mhz_most": "clocks.max.sm",
    "memory_mhz": "clocks.mem",
    "power_limit_w": "power.limit",
    "temperature_c": "temperature.gpu",
}
COPY_BYTES = 1 << 30
# rows of the square product; fp32 without the matrix unit is 15 times slower
SIZES = {torch.bfloat16: 8192, torch.float16: 8192, torch.float32: 4096}
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def facts(device: Cuda) -> dict[str, Any]:
    """What a GPU's number needs beside it."""
    p = device.properties
    triton = None
    if importlib.util.find_spec("triton"):
        import triton as module

        triton = module.__version__
    return {
        "name": p.name,
        "sms": p.multi_processor_count,
        "l2_mb": round(getattr(p, "L2_cache_size", 0) / 2**20, 1),
        "memory_gb": round(p.total_memory / 2**30, 1),
        "capability": f"{p.major}.{p.minor}",
        "cuda": torch.version.cuda or torch.version.hip,
        "triton": triton,
        **_smi(),
    }


def _smi() -> dict[str, str | None]:
    try:
        answer = subprocess.run(
            [
                "nvidia-smi",
                f"--query-gpu={','.join(SMI.values())}",
                "--format=csv,noheader,nounits",
            ],
            capture_output=True,
            text=True,
            check=True,
            timeout=20,
        ).stdout.splitlines()[0]
    except (OSError, IndexError, subprocess.SubprocessError):
        return dict.fromkeys(SMI)
    return dict(zip(SMI, (word.strip() for word in answer.split(",")), strict=False))


def peaks(device: Cuda, scale: float = 1.0) -> dict[str, float | None]:
    """Ceilings, measured now on random data.

    copy_gbs: a device-to-device copy, bytes read and written. read_gbs: a maximum over 1 GB.
    bf16_gflops, fp16_gflops, fp32_gflops: square matrix products; fp32 without TF32.

    Args:
        scale: of the sizes, for tests.
    """
    found: dict[str, float | None] = {**_memory(device, int(COPY_BYTES * scale) // 4)}
    for dtype, rows in SIZES.items():
        n = int(rows * scale**0.5)
        with device.making():
            a, b = (torch.randn(n, n, dtype=torch.float32).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        seconds = device.median(partial(torch.mm, a, b, out=out))
        found[f"{NAMES[dtype]}_gflops"] = 2 * n**3 / seconds / 1e9
        del a, b, out
    device.release()
    return found


def _memory(device: Cuda, elements: int) -> dict[str, float]:
    with device.making():
        source = torch.randn(elements)
        target = torch.empty_like(source)
    return {
        "copy_gbs": 2 * source.nbytes / device.median(lambda: target.copy_(source)) / 1e9,
        "read_gbs": source.nbytes / device.median(lambda: source.amax()) / 1e9,
    }


def floors(case: dict[str, Any], record: dict[str, Any]) -> float:
    """How many times its least traffic at the rate of a copy a provider takes."""
    return record["ms"]["p50"] / 1e3 / (case["bytes"] / 1e9 / case["peaks"]["gpu"]["copy_gbs"])


def rates(case: dict[str, Any], record: dict[str, Any]) -> dict[str, float]:
    """GB/s and GFLOP/s at the median, and their fractions of the device's ceilings."""
    seconds = record["ms"]["p50"] / 1e3
    ceilings = case["peaks"]["gpu"]
    size = next(name for dtype, name in NAMES.items() if str(dtype) == f"torch.{case['dtype']}")
    unit = "bf16" if size == "fp32" and record["screens"] else size
    gbs, gflops = case["bytes"] / seconds / 1e9, case["flops"] / seconds / 1e9
    return {
        "gbs": gbs,
        "gflops": gflops,
        "gbs_fraction": gbs / ceilings["copy_gbs"],
        "gflops_fraction": gflops / ceilings[f"{unit}_gflops"],
    }
