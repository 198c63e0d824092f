# SPDX-License-Identifier: Apache-2.0
"""The processor's name and features, from what Linux writes on each architecture."""

import platform
from pathlib import Path

import pytest
import torch

from mikernels import _crossover, info, machine
from mikernels.bench.harness import machine as bench_machine

X86 = """processor\t: 0
model name\t: AMD EPYC 9354 32-Core Processor
flags\t\t: fpu avx2 avx512f amx_tile
bugs\t\t:

processor\t: 1
model name\t: another
flags\t\t: fpu
"""
ARM = """processor\t: 0
BogoMIPS\t: 50.00
Features\t: fp asimd sve
CPU implementer\t: 0x41

"""


@pytest.mark.parametrize(
    "text, name, flags",
    [
        (X86, "AMD EPYC 9354 32-Core Processor", {"fpu", "avx2", "avx512f", "amx_tile"}),
        (ARM, platform.processor() or platform.machine(), {"fp", "asimd", "sve"}),
        ("", platform.processor() or platform.machine(), set()),
        (None, platform.processor() or platform.machine(), set()),
    ],
    ids=["x86", "arm", "empty", "absent"],
)
def test_the_processor(
    text: str | None, name: str, flags: set, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if text is not None:
        (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "cpuinfo")
    assert machine.cpu_name() == name and machine.cpu_flags() == flags
    # whoever asks gets the same answer
    assert info.collect()["cpu"]["model"] == name
    assert bench_machine.facts()["cpu"] == name
    known = {"avx2", "avx512f", "amx_tile", "asimd", "sve"} & flags
    assert set(bench_machine.facts()["flags"]) == known
    assert set(info.collect()["cpu"]["features"]) == known & {"avx2", "avx512f", "amx_tile"}
    assert _crossover.device_name(torch.device("cpu")) == name


def test_one_file_reads_it() -> None:
    root = Path(__file__).parent.parent
    readers = [
        path.relative_to(root).as_posix()
        for folder in ("mikernels", "bench", "kernels")
        for path in (root / folder).rglob("*.py")
        if '"/proc/cpuinfo"' in path.read_text(encoding="utf-8")
    ]
    assert readers == ["mikernels/machine.py"]
