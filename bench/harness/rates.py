# SPDX-License-Identifier: Apache-2.0
"""What a device can do, for predictions: rates, and instruction counts read off the compiler."""

from __future__ import annotations

import functools
import importlib.util
import re
import subprocess
import tempfile
import warnings
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Rates:
    """Per second. copy counts bytes read and written; matrix products are on random data.

    Attributes:
        copy, l2: bytes. bf16, fp32: FLOP of a large product (fp32 without TF32).
        fp64: FLOP outside the matrix unit. convert64: conversions from or to fp64.
        l2_bytes: what stays resident. sms, hertz: four schedulers an SM issue one warp a cycle.
        launch: seconds from one kernel's end to the next one's first useful byte.
        sort: keys of torch's stable radix sort with its payload.
    """

    name: str
    copy: float
    bf16: float
    fp32: float
    l2: float
    l2_bytes: float
    fp64: float
    sms: int = 132
    hertz: float = 1.755e9
    launch: float = 3e-6
    sort: float = 6.5e9

    @property
    def issue(self) -> float:
        """Warp instructions."""
        return self.sms * 4 * self.hertz

    @property
    def convert64(self) -> float:
        return self.sms * 16 * self.hertz


# copy and bf16 were measured on such machines; fp32 is 78 % of the data sheet's 67 TFLOP/s, l2 a
# lead; the rest is the data sheet's
DEVICES = {
    "h200": Rates("NVIDIA H200", 4.3e12, 790e12, 52e12, 5.5e12, 40e6, 34e12),
    "h100": Rates("NVIDIA H100", 3.0e12, 790e12, 52e12, 5.5e12, 33e6, 34e12),
}

# this pipe takes a warp in two cycles: half as many lanes as the schedulers issue
HALF_RATE = re.compile(r"^(ISETP|IADD3|LOP3|SEL|V?IMNMX|SHF|PRMT|PLOP3|LEA|FMNMX|FSETP|P2R|VOTE)")
# instructions of the group-maximum loop a score, where the compiler is not at hand
SCORE_INSTRUCTIONS = 5.0
# rows, and (F, k), of kernels/select/row_topk.py
WHOLE = (512, 2048, 8192)
PINNED = ((16384, 144), (24576, 32), (131072, 64), (131072, 256), (1 << 20, 64), (65536, 512))


@dataclass(frozen=True)
class Loop:
    """A loop of machine code: scheduler cycles of one warp for one round."""

    first: int
    last: int
    cycles: float


def loops(sass: str) -> tuple[list[Loop], float]:
    """The innermost loops of a kernel in order, and the cycles of everything outside them."""
    lines = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*)", sass, re.MULTILINE)
    labels: dict[str, int] = {}
    position = 0
    for line in sass.splitlines():
        label = re.match(r"^(\.L_\w+):", line)
        if label:
            labels[label[1]] = position
        elif re.match(r"^\s+/\*[0-9a-f]{4,}\*/", line):
            position += 1
    words = [re.sub(r"^@!?U?P\w+\s+", "", text) for _, text in lines]
    cycles = [2.0 if HALF_RATE.match(word) else 1.0 for word in words]
    found = []
    for at, word in enumerate(words):
        target = re.search(r"BRA.*`\((\.L_\w+)\)", word)
        if target and labels.get(target[1], at) < at:
            found.append(Loop(labels[target[1]], at, sum(cycles[labels[target[1]] : at + 1])))
    inner = [
        a
        for a in found
        if not any(a is not b and a.first <= b.first and b.last <= a.last for b in found)
    ]
    inside = sum(loop.cycles for loop in inner)
    return inner, sum(cycles) - inside


def sass_of(case: Any, target: str = "sm_90") -> str:
    """Machine code of a pinned case of a kernel (kernels/common/offline.py)."""
    from mikernels.kernels.common import offline

    with warnings.catch_warnings():
        # Triton's, about a default that is to change
        warnings.simplefilter("ignore")
        cubin = offline.compiled(case, target).asm["cubin"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [offline.tool("nvdisasm"), "-c", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@functools.cache
def row_cycles(n: int, k: int, dtype: str) -> tuple[float, str]:
    """Scheduler cycles of one row of n scores in row_topk, all warps, and how they were counted."""
    if importlib.util.find_spec("triton") is None:
        selection = 2 * 4096 * (9 if dtype != "fp32" else 25) * 4 / 32
        return n * 2 * SCORE_INSTRUCTIONS / 32 + selection, "estimated without Triton"
    from mikernels.kernels.select import row_topk

    # the pinned case of the launcher's kernel whose row is nearest in size
    size = {f"grouped {dtype} F={f} k={j}": (f, j) for f, j in PINNED}
    if row_topk.grouped_shape(n, k) is None:
        size = {f"whole {dtype} {f}": (f, k) for f in WHOLE if f >= n}
    cases = [case for case in row_topk.cases() if case.name in size]
    case = min(cases, key=lambda c: abs(size[c.name][0] - n) + abs(size[c.name][1] - k))
    found, straight = loops(sass_of(case))
    constants = case.constants
    # the k-th and the largest score share the sign and most of the exponent
    rounds = [25.0 - constants["UNUSED"]] * len(found)
    if "STEP" in constants:
        rounds[0] = n / (constants["STEP"] * constants["GROUP"])
    total = straight + sum(r * loop.cycles for r, loop in zip(rounds, found, strict=True))
    return case.num_warps * total, f"machine code of `{case.name}`, sm_90"


@functools.cache
def winners_cycles(width: int, c: int, dtype: str, first: bool) -> tuple[float, str]:
    """The same for one panel's row in encode, where c winners are kept; the first has no floor."""
    if importlib.util.find_spec("triton") is None:
        return row_cycles(width, c, dtype)
    from mikernels.kernels.sae import encode_winners

    grouped = encode_winners.shape_of(width, c).groups > 0
    fitting = [
        (case, [int(number) for number in re.findall(r"\d+", case.name)[1:]])
        for case in encode_winners.cases()
        if f"winners {dtype} " in case.name and ("GROUPS" in case.constants) == grouped
    ]
    case, _ = min(fitting, key=lambda f: abs(f[1][0] - width) + abs(f[1][1] - c))
    found, straight = loops(sass_of(case))
    constants = case.constants
    bits = 25.0 - constants["UNUSED"]
    # searches for the c-th group and the c-th score are the first panel's, merging the others'
    rounds = [bits if first else 0.0] * (len(found) - 1) + [0.0 if first else bits]
    if grouped:
        rounds[0] = width / (constants["STEP"] * constants["GROUP"])
    total = straight + sum(r * loop.cycles for r, loop in zip(rounds, found, strict=True))
    return case.num_warps * total, f"machine code of `{case.name}`, sm_90"


@functools.cache
def decode_cycles(d: int, k: int, dtype: str) -> float:
    """Scheduler cycles of one token in decode, all programs and warps; 0 without Triton."""
    if importlib.util.find_spec("triton") is None:
        return 0.0
    from mikernels.kernels.sae import decode

    case = next(case for case in decode.cases() if case.name == f"decode {dtype}")
    found, straight = loops(sass_of(case))
    rounds = k / case.constants["UNROLL"]
    programs = -(-d // case.constants["BLOCK"])
    return programs * case.num_warps * (straight + rounds * max(loop.cycles for loop in found))
