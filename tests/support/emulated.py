# SPDX-License-Identifier: Apache-2.0
"""CUDA C++ without a GPU: kernels run on the CPU, and what nvcc made of them.

csrc/cuda/<name>_body.h is compiled by the C++ compiler against tests/support/cuda_on_cpu, where
each thread of a block is a fiber. Threads run in several orders between barriers, so that a barrier
that is missing shows.
"""

import ctypes
import functools
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch

from mikernels import _ext

ROOT = Path(__file__).resolve().parents[2]
# of cuda_on_cpu's format argument
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# threads in index order, last released first, at random
ORDERS = (0, 1, 7)


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


@functools.cache
def _usage() -> str:
    """What cuobjdump says of every kernel in the extension."""
    if _ext.C is None or _ext.build_facts()["cuda"]["reason"]:
        pytest.skip(f"no CUDA kernels: {_ext.cuda_missing()}")
    tool = shutil.which("cuobjdump")
    if tool is None and (found := importlib.util.find_spec("triton")) is not None:
        tool = str(Path(found.origin).parent / "backends/nvidia/bin/cuobjdump")
    if tool is None or not Path(tool).exists():
        pytest.skip("no cuobjdump, on PATH or beside Triton")
    command = [tool, "--dump-resource-usage", _ext.C.__file__]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def check_built(name: str, count: int, registers: int) -> None:
    """The extension has `count` kernels of csrc/cuda/<name>.cu for each architecture it was built
    for: without spills, in so many registers, with no shared memory but what a launch asks for."""
    number: dict[str, int] = {}
    # code alone: of PTX there is nothing to say
    for part in re.split(r"^Fatbin (?=elf|ptx)", _usage(), flags=re.MULTILINE):
        if not part.startswith("elf"):
            continue
        (arch,) = re.findall(r"^arch = (sm_\w+)", part, re.MULTILINE)
        kernels = re.findall(rf"Function (\w+\d{name}\w*_kernel\w*):\s+(.*)", part)
        for kernel, line in kernels:
            used = {key: int(size) for key, size in re.findall(r"(\w+):(\d+)", line)}
            assert used["STACK"] == used["LOCAL"] == 0, (arch, kernel, line)
            # from sm_90 on, 1 kB of every block is the system's
            assert used["REG"] <= registers and used["SHARED"] in (0, 1024), (arch, kernel, line)
        number[arch] = number.get(arch, 0) + len(kernels)
    built = [re.sub(r"\+PTX|\.", "", arch) for arch in _ext.build_facts()["cuda"]["archs"]]
    assert number == {f"sm_{arch}": count for arch in built}
