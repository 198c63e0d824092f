# SPDX-License-Identifier: Apache-2.0
"""by_feature in CUDA C++ without a GPU: its kernels run on the CPU, and what nvcc made of them."""

import ctypes

import pytest
import torch
from emulated import ORDERS, check_built, library, struct
from hypothesis import given
from hypothesis import strategies as st

from mikernels import _ext
from mikernels.ops.sae.gradients import by_feature_op, by_feature_reference

# slots of a block at a time, where there are many
TILE = 4096

Call = struct(
    features=ctypes.c_void_p,
    slots=ctypes.c_int64,
    n_features=ctypes.c_int64,
    most_chunks=ctypes.c_int64,
    few_chunks=ctypes.c_int64,
    offsets=ctypes.c_void_p,
    order=ctypes.c_void_p,
    order_of_threads=ctypes.c_uint64,
)


def run(indices, n_features, *, chunks=128, few=64, order=0):
    offsets, slots = torch.full((n_features + 3,), -77), torch.full((len(indices) + 2,), -77)
    call = Call(
        indices.data_ptr(),
        len(indices),
        n_features,
        chunks,
        few,
        offsets[1:].data_ptr(),
        slots[1:].data_ptr(),
        order,
    )
    message = library("by_feature").by_feature(ctypes.byref(call))
    assert message == b"", message
    for guarded in (offsets, slots):
        assert guarded[0] == guarded[-1] == -77, "written beside the results"
    return offsets[1:-1], slots[1:-1]


def check(indices, n_features, **how):
    found = run(indices, n_features, **how)
    for a, e in zip(found, by_feature_reference(indices, n_features), strict=True):
        assert torch.equal(a, e), (len(indices), n_features, how)


def draw(m, n_features, seed=0):
    return torch.randint(n_features, (m,), generator=torch.Generator().manual_seed(seed))


# digits of one, two and three passes, and the features beside their ends
@pytest.mark.parametrize("n_features", [1, 2, 511, 512, 513, 3000, 2**18, 2**18 + 1])
def test_is_a_stable_counting_sort(n_features):
    for number, m in enumerate((1, 31, 700)):
        check(draw(m, n_features), n_features, order=ORDERS[number])
    # features at both ends, among few slots
    check(torch.tensor([n_features - 1, 0, n_features - 1, n_features // 2]), n_features)


@pytest.mark.parametrize("n_features", [1, 300, 70_001])
def test_of_many_tiles(n_features):
    """Chunks of one tile and of several, a last one that is not full, and full ones alone; tiles
    of 4096, 2048 and 512."""
    for m, chunks, few, order in (
        (2 * TILE + 5, 128, 1, 1),
        (3 * TILE + 1, 2, 1, 7),
        (2 * TILE, 1, 4, 0),
        (2 * TILE + 300, 128, 64, 9),
    ):
        check(draw(m, n_features, m), n_features, chunks=chunks, few=few, order=order)


def test_of_features_that_crowd():
    n = 5000
    ordered = draw(TILE + 900, n).sort().values
    for indices in (
        # all slots one feature: each end, and between
        *(torch.full((TILE + 77,), f) for f in (0, 1234, n - 1)),
        ordered,
        ordered.flip(0),
        draw(2 * TILE, 3) * 2111,
    ):
        check(indices, n, chunks=2, few=1)


def test_of_indices_outside_stays_inside():
    """Garbage in, but a permutation out, and nothing written elsewhere."""
    indices = draw(900, 700)
    indices[::7] = torch.tensor([-1, 700, 2**40, -(2**63), 1023]).repeat(26)[: len(indices[::7])]
    offsets, order = run(indices, 700)
    assert torch.equal(order.sort().values, torch.arange(900))
    assert (offsets >= 0).all() and (offsets.diff() >= 0).all() and offsets[-1] == 900


@given(
    m=st.integers(1, 300),
    n_features=st.one_of(st.integers(1, 40), st.integers(1, 2**20)),
    seed=st.integers(0, 2**16),
    crowded=st.booleans(),
)
def test_property(m, n_features, seed, crowded):
    indices = draw(m, n_features, seed)
    check(indices % 3 % n_features if crowded else indices, n_features, order=seed)


def test_plan_of_any_size():
    facts = (ctypes.c_int64 * 6)()
    for slots in (1, TILE, TILE + 1, 131_072, 524_288, 2**20 + 1, 2**31 - 2):
        for n_features in (1, 2, 512, 513, 32_768, 131_072, 2**18, 2**18 + 1, 2**31 - 2):
            library("by_feature").by_feature_plan(
                ctypes.c_int64(slots), ctypes.c_int64(n_features), facts
            )
            passes, digit_bits, bits, items, chunks, tiles = facts
            assert 2**bits >= n_features and digit_bits <= 9
            assert (passes - 1) * digit_bits < max(bits, 1) <= max(passes * digit_bits, 1)
            chunk = tiles * items * 512
            assert items <= 8 and chunks <= 128 and (chunks - 1) * chunk < slots <= chunks * chunk
    library("by_feature").by_feature_plan(ctypes.c_int64(8192 * 64), ctypes.c_int64(131_072), facts)
    assert list(facts) == [2, 9, 17, 8, 128, 1]


def test_nvcc_made_no_spills():
    # two blocks of 512 threads on a multiprocessor
    check_built("by_feature", 6, 64)


def test_operator_is_there_or_says_why_not():
    if _ext.C is None or _ext.build_facts()["cuda"]["reason"]:
        pytest.skip(by_feature_op.backends()["cuda"])
    assert by_feature_op.backends()["cuda"] == "ready"
    indices = torch.empty(300, device="meta", dtype=torch.int64)
    # of the raw operator: by name it takes cuda tensors alone
    offsets, order = torch.ops.mikernels.by_feature_cuda(indices, 7)
    assert offsets.shape == (8,) and order.shape == (300,)
    assert offsets.dtype == order.dtype == torch.int64
    with pytest.raises(
        RuntimeError, match=r"by_feature: impl='cuda' runs on cuda tensors, got cpu"
    ):
        by_feature_op(torch.zeros(3, dtype=torch.int64), 4, impl="cuda")
