# SPDX-License-Identifier: Apache-2.0
"""CUDA C++ without a GPU: kernels run on the CPU, and what nvcc makes of them.

csrc/cuda/<name>_body.h is compiled by the C++ compiler against tests/support/cuda_on_cpu, where
each thread of a block is a fiber. Threads run in several orders between barriers, so that a barrier
that is missing shows.
"""

import ctypes
import functools
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
# of cuda_on_cpu's format argument
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# threads in index order, last released first, at random
ORDERS = (0, 1, 7)
TARGETS = (80, 90, 100)


@functools.cache
def library(name: str) -> ctypes.CDLL:
    """tests/support/cuda_on_cpu/<name>.cpp, whose function <name> answers "" or what went wrong."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("no C++ compiler")
    folder = ROOT / "tests/support/cuda_on_cpu"
    sources = [str(folder / source) for source in ("emulator.cpp", f"{name}.cpp")]
    flags = ["-O1", "-std=c++20", "-fPIC", "-shared", "-fno-strict-aliasing", "-Wall"]
    flags += ["-Wno-unknown-pragmas", f"-I{folder}", f"-I{ROOT / 'csrc'}"]
    with tempfile.TemporaryDirectory() as built:
        path = f"{built}/{name}.so"
        command = [compiler, *flags, *sources, "-o", path]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        loaded = ctypes.CDLL(path)
    getattr(loaded, name).restype = ctypes.c_char_p
    return loaded


def struct(**fields: type) -> type[ctypes.Structure]:
    """The Call of a library, of these fields in order."""
    return type("Call", (ctypes.Structure,), {"_fields_": list(fields.items())})


def bits(t: torch.Tensor) -> torch.Tensor:
    return t.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[t.dtype.itemsize])


def check_nvcc(instances: str, count: int, registers: int, targets=TARGETS) -> None:
    """nvcc compiles these instances, `count` kernels, for all targets: without spills, in so many
    registers, with no shared memory but what a launch asks for."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc on PATH")
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True)
    # an older nvcc knows fewer
    targets = [a for a in targets if f"compute_{a}" in listed.stdout.split()]
    archs = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in targets]
    flags = ["-c", "-O3", "-std=c++20", "-Xptxas=-v", f"-I{ROOT / 'csrc'}"]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "instances.cu")
        source.write_text(instances)
        command = [nvcc, *flags, *archs, str(source), "-o", f"{folder}/instances.o"]
        done = subprocess.run(command, capture_output=True, text=True)
    report = done.stdout + done.stderr
    assert done.returncode == 0, report
    functions = re.findall(r"entry function '\w+' for '(sm_\d+)'", report)
    assert sorted(functions) == sorted([f"sm_{a}" for a in targets] * count), report
    wanted = "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"
    assert report.count(wanted) == report.count("bytes stack frame") == len(functions), report
    assert not re.search(r"[1-9]\d* bytes smem", report), report
    used = [int(r) for r in re.findall(r"Used (\d+) registers", report)]
    assert max(used) <= registers, report
