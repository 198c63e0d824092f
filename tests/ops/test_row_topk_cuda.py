# SPDX-License-Identifier: Apache-2.0
"""row_topk in CUDA C++ without a GPU: its kernel run on the CPU, and what nvcc makes of it.

csrc/cuda/row_topk_body.h is compiled by the C++ compiler against tests/support/cuda_on_cpu, where
each thread of a block is a fiber. Threads run in several orders between barriers, so that a barrier
that is missing shows.
"""

import ctypes
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import best, randint, randn
from row_topk_cases import INF, NAN, SPECIAL_ROWS

import mikernels
from mikernels import _ext
from mikernels.ops.select.row_topk import row_topk_op

ROOT = Path(__file__).resolve().parents[2]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# threads in index order, last released first, at random
ORDERS = (0, 1, 7)


class Call(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("scores",)),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "stride", "k")),
        ("sorted", ctypes.c_int32),
        *((name, ctypes.c_void_p) for name in ("values", "indices")),
        *((name, ctypes.c_int32) for name in ("threads", "spread", "whole_row", "sort_shared")),
        ("order", ctypes.c_uint64),
    ]


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("no C++ compiler")
    built = tmp_path_factory.mktemp("cuda_on_cpu") / "row_topk.so"
    folder = ROOT / "tests/support/cuda_on_cpu"
    sources = [str(folder / name) for name in ("emulator.cpp", "row_topk.cpp")]
    flags = ["-O1", "-std=c++20", "-fPIC", "-shared", "-fno-strict-aliasing", "-Wall"]
    flags += ["-Wno-unknown-pragmas", f"-I{folder}", f"-I{ROOT / 'csrc'}"]
    done = subprocess.run(
        [compiler, *flags, *sources, "-o", str(built)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    library = ctypes.CDLL(str(built))
    library.row_topk.restype = ctypes.c_char_p
    return library


def guarded(rows: torch.Tensor, stride: int, offset: int) -> torch.Tensor:
    """A copy of `rows` with this row stride, `offset` elements behind a 16-byte boundary, all other
    memory NaN, which would rank first if it were read."""
    n, columns = rows.shape
    size = 16 + offset + (n - 1) * stride + columns + 16
    memory = torch.full((size,), NAN, dtype=rows.dtype)
    assert memory.data_ptr() % 16 == 0
    view = memory[16 + offset :].as_strided((n, columns), (stride, 1))
    # as integers: a copy of floats may give a NaN other bits
    for to, row in zip(view, rows, strict=True):
        bits(to).copy_(bits(row))
    return view


def bits(t: torch.Tensor) -> torch.Tensor:
    return t.view(torch.int32 if t.dtype == torch.float32 else torch.int16)


def check(library, rows, k, sorted=False, *, stride=None, offset=0, order=0, **forced):
    n, columns = rows.shape
    scores = guarded(rows, columns if stride is None else stride, offset)
    values = torch.full((n * k + 8,), 77.0).to(rows.dtype)
    indices = torch.full((n * k + 8,), -77)
    plan = {name: forced.get(name, -1) for name in ("threads", "spread", "whole_row")}
    call = Call(
        scores=scores.data_ptr(),
        rows=n,
        columns=columns,
        stride=scores.stride(0),
        k=k,
        sorted=sorted,
        values=values.data_ptr(),
        indices=indices.data_ptr(),
        sort_shared=forced.get("sort_shared", -1),
        order=order,
        **plan,
    )
    message = library.row_topk(DTYPES.index(rows.dtype), ctypes.byref(call))
    assert message == b"", message
    expected = best(rows.float(), k)
    if not sorted:
        expected = expected.sort(-1).values
    assert torch.equal(indices[: n * k].reshape(n, k), expected), (rows.shape, k, sorted, forced)
    assert torch.equal(bits(values[: n * k]).reshape(n, k), bits(rows).gather(-1, expected))
    assert (indices[n * k :] == -77).all() and (values[n * k :] == 77).all(), "written past the end"


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "n, columns, k",
    [
        (1, 1, 1),
        (1, 17, 17),
        (5, 67, 1),
        (3, 257, 32),
        (2, 4099, 64),
        (1, 17001, 9),
        (1, 4096, 700),
    ],
)
def test_as_planned(library, dtype, n, columns, k, order):
    rows = randn(n, columns, dtype=dtype)
    check(library, rows, k, False, order=order)
    check(library, rows, k, True, order=order)


# every way through the kernel: groups of one vector to a warp's worth, or none; both sorts
WAYS = [
    *({"spread": spread, "whole_row": 0, "threads": 32} for spread in range(6)),
    {"whole_row": 1, "threads": 64},
    {"whole_row": 1, "sort_shared": 0},
]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(f"{k}{v}" for k, v in way.items()))
@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_go_to_the_lowest_index(library, dtype, way):
    rows = randint(2, 4421, dtype=dtype)
    for k, offset, order in ((1, 0, 0), (16, 3, 1), (17, 1, 2)):
        check(library, rows, k, True, offset=offset, order=order, **way)
        check(library, rows, k, False, offset=offset, order=order, **way)


ROWS = SPECIAL_ROWS | {
    "nan of both signs": lambda row: row[::3].fill_(NAN)[::2].neg_(),
    "-inf and nan": lambda row: row.fill_(-INF)[3::50].fill_(NAN),
    "one block of winners": lambda row: row[500:600].add_(100),
}


@pytest.mark.parametrize("case", ROWS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_special_rows(library, dtype, case):
    rows = randn(2, 1031, dtype=dtype)
    ROWS[case](rows[1])
    for k, offset in ((1, 0), (16, 5), (1031, 2)):
        check(library, rows, k, True, offset=offset, order=3)
        check(library, rows, k, False, offset=offset, order=4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_k_and_every_alignment(library, dtype):
    rows = randint(1, 45, dtype=dtype)
    for k in range(1, 46):
        check(library, rows, k, k % 2 == 0, offset=k % 8)
    rows = randn(3, 1000, dtype=dtype)
    for offset in range(8):
        check(library, rows, 10, stride=1000 + offset, offset=offset)
    check(library, rows[:1].expand(3, 1000), 10, stride=0, offset=1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_long_row(library, dtype):
    # several unrolled tiles, 256 threads, with and without a part of a vector at the ends
    for columns, offset in ((65536, 0), (65541, 3)):
        rows = randn(1, columns, dtype=dtype)
        check(library, rows, 64, offset=offset, threads=256, order=5)


@given(st.data())
def test_property(library, data):
    dtype = data.draw(st.sampled_from(DTYPES), "dtype")
    columns = data.draw(st.integers(1, 700), "columns")
    k = data.draw(st.one_of(st.integers(1, min(columns, 20)), st.integers(1, columns)), "k")
    seed = data.draw(st.integers(0, 2**16), "seed")
    make = data.draw(st.sampled_from([randn, randint]))
    spread = data.draw(st.integers(0, 5), "spread")
    groups = -(-columns // (16 // dtype.itemsize << spread))
    check(
        library,
        make(1, columns, dtype=dtype, seed=seed),
        k,
        data.draw(st.booleans(), "sorted"),
        offset=data.draw(st.integers(0, 7), "offset"),
        order=seed,
        threads=data.draw(st.sampled_from([32, 96, 128, 256]), "threads"),
        spread=spread,
        whole_row=int(groups < k or data.draw(st.booleans(), "whole_row")),
        sort_shared=int(data.draw(st.booleans(), "sort_shared")),
    )


def plan(library, dtype, columns, k, sorted) -> dict[str, int]:
    out = (ctypes.c_int64 * 5)()
    sizes = ctypes.c_int64(columns), ctypes.c_int64(k)
    library.row_topk_plan(DTYPES.index(dtype), *sizes, int(sorted), out)
    names = ("threads", "spread", "whole_row", "sort_shared", "shared_bytes")
    return dict(zip(names, out, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_plan_fits_whatever_the_shape(library, dtype):
    vector = 16 // dtype.itemsize
    for exponent in range(31):
        for columns in {2**exponent, min(2**exponent + 1, 2**31 - 2), max(2**exponent - 1, 1)}:
            for k in (1, 32, 64, 1024, 4096, 4097, columns // 2, columns):
                if not 1 <= k <= columns:
                    continue
                for sorted in (False, True):
                    chosen = plan(library, dtype, columns, k, sorted)
                    # one less than a row that starts inside a vector may have
                    groups = -(-columns // (vector << chosen["spread"]))
                    assert chosen["shared_bytes"] <= 48 << 10
                    assert chosen["whole_row"] or k <= groups < 2**16, (columns, k, chosen)


def test_plan_of_the_sizes_that_matter(library):
    # 64 elements a group at 131072 x 64: 4 kB of maxima, 8 kB of each row read again
    chosen = plan(library, torch.bfloat16, 131072, 64, False)
    assert (chosen["threads"], chosen["spread"], chosen["whole_row"]) == (256, 3, 0)
    assert chosen["shared_bytes"] < 6 << 10
    for columns, k in ((1 << 20, 256), (16384, 32), (65536, 1024)):
        for dtype in DTYPES:
            assert not plan(library, dtype, columns, k, True)["whole_row"]


INSTANCE = """
#include "cuda/row_topk_body.h"
template __global__ void mik::cuda::row_topk_kernel<mik::cuda::FORMAT>(
    const mik::cuda::FORMAT::Bits*, int64_t, uint32_t, uint32_t, bool, mik::cuda::Plan,
    mik::cuda::FORMAT::Bits*, int64_t*);
"""


def test_nvcc_makes_no_spills(tmp_path):
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc on PATH")
    source = tmp_path / "row_topk.cu"
    source.write_text("".join(INSTANCE.replace("FORMAT", f) for f in ("Bf16", "Fp16", "Fp32")))
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True)
    # an older nvcc knows fewer
    targets = [a for a in (80, 90, 100) if f"compute_{a}" in listed.stdout.split()]
    archs = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in targets]
    flags = ["-c", "-O3", "-std=c++20", "-Xptxas=-v", f"-I{ROOT / 'csrc'}"]
    command = [nvcc, *flags, *archs, str(source), "-o", str(tmp_path / "row_topk.o")]
    done = subprocess.run(command, capture_output=True, text=True)
    report = done.stdout + done.stderr
    assert done.returncode == 0, report
    functions = re.findall(r"entry function '\w*row_topk_kernel\w*' for '(sm_\d+)'", report)
    assert sorted(functions) == sorted([f"sm_{a}" for a in targets] * 3)
    wanted = "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"
    assert report.count(wanted) == report.count("bytes stack frame") == len(functions), report
    # all shared memory is what the plan asks for
    assert not re.search(r"[1-9]\d* bytes smem", report)
    assert all(int(r) <= 48 for r in re.findall(r"Used (\d+) registers", report)), report


def test_operator_is_there_or_says_why_not():
    if _ext.C is None:
        pytest.skip(f"no extension ({_ext.MISSING})")
    built = _ext.build_facts()["cuda"]
    state = row_topk_op.backends()["cuda"]
    if built["reason"]:
        assert state == built["reason"]
        pytest.skip(f"no CUDA kernels: {state}")
    assert state == "ready" and built["nvcc"] and built["archs"]
    scores = torch.empty(5, 300, device="meta", dtype=torch.bfloat16)
    # of the raw operator: by name it takes cuda tensors alone
    values, indices = torch.ops.mikernels.row_topk_cuda(scores, 7, False)
    assert values.shape == indices.shape == (5, 7)
    assert (values.dtype, indices.dtype) == (torch.bfloat16, torch.int64)
    with pytest.raises(RuntimeError, match="row_topk: impl='cuda' .*runs on cuda tensors, got cpu"):
        mikernels.row_topk(torch.zeros(2, 3), 1, impl="cuda")
