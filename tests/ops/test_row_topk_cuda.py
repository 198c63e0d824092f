# SPDX-License-Identifier: Apache-2.0
"""row_topk in CUDA C++ without a GPU: its kernel run on the CPU, and what nvcc made of it."""

import ctypes

import pytest
import torch
from emulated import DTYPES, ORDERS, bits, check_built, library, struct
from hypothesis import given
from hypothesis import strategies as st
from oracle import best, randint, randn
from row_topk_cases import INF, NAN, SPECIAL_ROWS

import mikernels
from mikernels import _ext
from mikernels.ops.select.row_topk import row_topk_op

Call = struct(
    scores=ctypes.c_void_p,
    **dict.fromkeys(("rows", "columns", "stride", "k"), ctypes.c_int64),
    sorted=ctypes.c_int32,
    **dict.fromkeys(("values", "indices"), ctypes.c_void_p),
    **dict.fromkeys(("stride_out", "base"), ctypes.c_int64),
    **dict.fromkeys(("wide", "threads", "spread", "whole_row", "sort_shared"), ctypes.c_int32),
    order=ctypes.c_uint64,
)


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


def check(rows, k, sorted=False, *, stride=None, offset=0, order=0, into=None, **forced):
    """`into` is (row stride, base, dtype of indices) of a part of larger outputs."""
    n, columns = rows.shape
    scores = guarded(rows, columns if stride is None else stride, offset)
    stride_out, base, dtype = into or (k, 0, torch.int64)
    values = torch.full((n * stride_out + 8,), 77.0).to(rows.dtype)
    indices = torch.full((n * stride_out + 8,), -77, dtype=dtype)
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
        stride_out=stride_out,
        base=base,
        wide=dtype == torch.int64,
        sort_shared=forced.get("sort_shared", -1),
        order=order,
        **plan,
    )
    message = library("row_topk").row_topk(DTYPES.index(rows.dtype), ctypes.byref(call))
    assert message == b"", message
    expected = best(rows.float(), k)
    if not sorted:
        expected = expected.sort(-1).values
    mine = torch.zeros(len(values), dtype=torch.bool)
    mine.as_strided((n, k), (stride_out, 1)).fill_(True)
    assert torch.equal(indices[mine].reshape(n, k), (expected + base).to(dtype)), (
        rows.shape,
        k,
        sorted,
        forced,
    )
    assert torch.equal(bits(values[mine]).reshape(n, k), bits(rows).gather(-1, expected))
    assert (indices[~mine] == -77).all() and (values[~mine] == 77).all(), "written elsewhere"


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
def test_as_planned(dtype, n, columns, k, order):
    rows = randn(n, columns, dtype=dtype)
    check(rows, k, False, order=order)
    check(rows, k, True, order=order)


# every way through the kernel: groups of one vector to a warp's worth, or none; both sorts
WAYS = [
    *({"spread": spread, "whole_row": 0, "threads": 32} for spread in range(6)),
    {"whole_row": 1, "threads": 64},
    {"whole_row": 1, "sort_shared": 0},
]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(f"{k}{v}" for k, v in way.items()))
@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_go_to_the_lowest_index(dtype, way):
    rows = randint(2, 4421, dtype=dtype)
    for k, offset, order in ((1, 0, 0), (16, 3, 1), (17, 1, 2)):
        check(rows, k, True, offset=offset, order=order, **way)
        check(rows, k, False, offset=offset, order=order, **way)


ROWS = SPECIAL_ROWS | {
    "nan of both signs": lambda row: row[::3].fill_(NAN)[::2].neg_(),
    "-inf and nan": lambda row: row.fill_(-INF)[3::50].fill_(NAN),
    "one block of winners": lambda row: row[500:600].add_(100),
}


@pytest.mark.parametrize("case", ROWS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_special_rows(dtype, case):
    rows = randn(2, 1031, dtype=dtype)
    ROWS[case](rows[1])
    for k, offset in ((1, 0), (16, 5), (1031, 2)):
        check(rows, k, True, offset=offset, order=3)
        check(rows, k, False, offset=offset, order=4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_k_and_every_alignment(dtype):
    rows = randint(1, 45, dtype=dtype)
    for k in range(1, 46):
        check(rows, k, k % 2 == 0, offset=k % 8)
    rows = randn(3, 1000, dtype=dtype)
    for offset in range(8):
        check(rows, 10, stride=1000 + offset, offset=offset)
    check(rows[:1].expand(3, 1000), 10, stride=0, offset=1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_into_part_of_larger_outputs(dtype):
    rows = randint(3, 700, dtype=dtype)
    for way in (WAYS[1], WAYS[-1]):
        for to in (
            (17, 0, torch.int32),
            (40, 131_072, torch.int32),
            (18, 2**31 - 701, torch.int64),
        ):
            check(rows, 17, into=to, order=5, **way)
    check(rows, 17, True, into=(40, 131_072, torch.int64), **WAYS[-1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_long_row(dtype):
    # several unrolled tiles, 256 threads, with and without a part of a vector at the ends
    for columns, offset in ((65536, 0), (65541, 3)):
        rows = randn(1, columns, dtype=dtype)
        check(rows, 64, offset=offset, threads=256, order=5)


@given(st.data())
def test_property(data):
    dtype = data.draw(st.sampled_from(DTYPES), "dtype")
    columns = data.draw(st.integers(1, 700), "columns")
    k = data.draw(st.one_of(st.integers(1, min(columns, 20)), st.integers(1, columns)), "k")
    seed = data.draw(st.integers(0, 2**16), "seed")
    make = data.draw(st.sampled_from([randn, randint]))
    spread = data.draw(st.integers(0, 5), "spread")
    groups = -(-columns // (16 // dtype.itemsize << spread))
    check(
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


def plan(dtype, columns, k, sorted) -> dict[str, int]:
    out = (ctypes.c_int64 * 5)()
    sizes = ctypes.c_int64(columns), ctypes.c_int64(k)
    library("row_topk").row_topk_plan(DTYPES.index(dtype), *sizes, int(sorted), out)
    names = ("threads", "spread", "whole_row", "sort_shared", "shared_bytes")
    return dict(zip(names, out, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_plan_fits_whatever_the_shape(dtype):
    vector = 16 // dtype.itemsize
    for exponent in range(31):
        for columns in {2**exponent, min(2**exponent + 1, 2**31 - 2), max(2**exponent - 1, 1)}:
            for k in (1, 32, 64, 1024, 4096, 4097, columns // 2, columns):
                if not 1 <= k <= columns:
                    continue
                for sorted in (False, True):
                    chosen = plan(dtype, columns, k, sorted)
                    # one less than a row that starts inside a vector may have
                    groups = -(-columns // (vector << chosen["spread"]))
                    assert chosen["shared_bytes"] <= 48 << 10
                    assert chosen["whole_row"] or k <= groups < 2**16, (columns, k, chosen)


def test_plan_of_the_sizes_that_matter():
    # 64 elements a group at 131072 x 64: 4 kB of maxima, 8 kB of each row read again
    chosen = plan(torch.bfloat16, 131072, 64, False)
    assert (chosen["threads"], chosen["spread"], chosen["whole_row"]) == (256, 3, 0)
    assert chosen["shared_bytes"] < 6 << 10
    for columns, k in ((1 << 20, 256), (16384, 32), (65536, 1024)):
        for dtype in DTYPES:
            assert not plan(dtype, columns, k, True)["whole_row"]


def test_nvcc_made_no_spills():
    # five blocks of 256 threads on a multiprocessor
    check_built("row_topk", 3, 48)


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
