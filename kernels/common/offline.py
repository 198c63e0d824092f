# SPDX-License-Identifier: Apache-2.0
"""Compiles kernels for GPUs that are not there, and reads what the compiler made of them.

The machine code is the one a launch would run: same source, same specialisation on divisibility by
16, same warps and stages. What can be told without a GPU: registers, spills, shared memory, and
whether the matrix unit is used.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .launch import PINNED, Kernel

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# bytes of shared memory that one block may use
SHARED_LIMIT = {
    "sm_80": 163 << 10,
    "sm_89": 99 << 10,
    "sm_90": 227 << 10,
    "sm_100": 227 << 10,
    "sm_120": 99 << 10,
    "gfx942": 64 << 10,
}
# in PTX, of which the assembler makes instructions of the matrix unit one by one, and in AMD's code
MATRIX = {"cuda": r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\.", "hip": r"\bv_mfma_"}


@dataclass(frozen=True)
class Case:
    """One kernel in one pinned configuration.

    Attributes:
        name: unique within the module, e.g. "grouped bf16 k=64".
        kernel: what a launcher launches.
        types: run-time argument -> Triton type ("*fp32", "*bf16", "i32", "i64", "fp32").
        constants: constexpr argument -> value.
        divisible: run-time arguments divisible by 16 (pointers always are).
        matrix: a matrix instruction is expected.
        targets: where it is used; kernels without products differ little between NVIDIA's.
    """

    name: str
    kernel: Kernel
    types: Mapping[str, str]
    constants: Mapping[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 3
    divisible: tuple[str, ...] = ()
    matrix: bool = False
    targets: tuple[str, ...] = ("sm_80", "sm_90", "sm_100", "gfx942")


def with_odd_sizes(cases: list[Case]) -> list[Case]:
    """The cases, and the fp32 ones again for sizes of which nothing is known."""
    odd = [c for c in cases if "fp32" in c.name and c.divisible]
    return cases + [replace(c, name=f"{c.name}, odd sizes", divisible=()) for c in odd]


@dataclass(frozen=True)
class Report:
    """What the compiler made of a case; spills in bytes of memory per thread."""

    registers: int
    spills: int
    shared: int
    matrix_instructions: int


def compiled(case: Case, target: str) -> Any:
    """Triton's compiled kernel for a target of TARGETS; raises what the compiler raises."""
    names = case.kernel.jit.arg_names
    aligned = {n for n, t in case.types.items() if t.startswith("*")} | set(case.divisible)
    source = ASTSource(
        fn=case.kernel.jit,
        signature={n: case.types.get(n, "constexpr") for n in names},
        constexprs={(names.index(n),): value for n, value in case.constants.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in aligned},
    )
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages, **PINNED}
    return triton.compile(source, target=TARGETS[target], options=options)


def compile_case(case: Case, target: str) -> Report:
    """Compile for a target of TARGETS; raises what the compiler raises."""
    kernel = compiled(case, target)
    backend = TARGETS[target].backend
    read, code = (_nvidia, "ptx") if backend == "cuda" else (_amd, "amdgcn")
    matrix = len(re.findall(MATRIX[backend], kernel.asm[code]))
    return Report(*read(kernel), kernel.metadata.shared, matrix)


def tool(name: str) -> str:
    """The path of a tool that comes with Triton."""
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _nvidia(kernel: Any) -> tuple[int, int]:
    """Registers and spills; disassembling to see them would take as long as the compilation."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        command = [tool("cuobjdump"), "--dump-resource-usage", cubin.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = {key: int(size) for key, size in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    # the stack holds spilled registers and nothing else here
    return used["REG"], max(used["STACK"], used["LOCAL"])


def _amd(kernel: Any) -> tuple[int, int]:
    """Registers and spills; scalar registers spill into vector lanes, which costs no memory."""

    def number(name: str) -> int:
        return int(re.findall(rf"\.{name}:\s+(\d+)", kernel.asm["amdgcn"])[-1])

    spills = max(number("vgpr_spill_count"), number("private_segment_fixed_size"))
    return number("vgpr_count"), spills
