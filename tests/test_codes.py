# SPDX-License-Identifier: Apache-2.0
import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import DTYPES, randint, randn, random_indices, unchanged

from mikernels import SparseCodes


def make(*leading, k=4, n_features=30, dtype=torch.float32, seed=0):
    """Codes with inactive slots, and the dense tensor that they stand for."""
    n = torch.Size(leading).numel()
    values = randn(n, k, dtype=dtype, seed=seed)
    values[::2, 1:3] = 0
    indices = random_indices(n, k, n_features, seed=seed)
    dense = torch.zeros(n, n_features, dtype=dtype)
    for row in range(n):
        for value, index in zip(values[row], indices[row], strict=True):
            dense[row, index] = value
    codes = SparseCodes(values.reshape(*leading, k), indices.reshape(*leading, k), n_features)
    return codes, dense.reshape(*leading, n_features)


LEADING = [(), (1,), (7,), (2, 5), (2, 3, 2), (0,), (3, 0)]


@pytest.mark.parametrize("leading", LEADING)
@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_forms(leading, dtype):
    codes, dense = make(*leading, dtype=dtype)
    with unchanged(codes.values, codes.indices):
        assert codes.k == 4 and codes.shape == dense.shape
        assert torch.equal(codes.to_dense(), dense)
        assert torch.equal(codes.l0(), (dense != 0).sum(-1))
        active = (dense != 0).reshape(-1, 30).sum(0)
        assert torch.equal(codes.fired(), active) and codes.fired().dtype == torch.int64
        csr = codes.to_csr()
        assert csr.shape == (dense[..., 0].numel(), 30)
        assert csr.values().numel() == (dense != 0).sum()
        assert torch.equal(csr.to_dense(), dense.reshape(-1, 30))


@pytest.mark.parametrize("leading", LEADING)
@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_from_dense(leading, dtype):
    _, dense = make(*leading, dtype=dtype)
    with unchanged(dense):
        whole = SparseCodes.from_dense(dense)
        assert torch.equal(whole.to_dense(), dense)
        best = SparseCodes.from_dense(dense.abs(), k=2)
    assert best.values.shape == (*leading, 2)
    top = dense.abs().topk(2, dim=-1).values
    assert torch.equal(best.values.sort(-1, descending=True).values, top)


def test_codes_from_dense_keeps_negative_codes_and_nan():
    dense = torch.tensor([[0.0, -2.0, 0.0, 1.0], [float("nan"), 0.0, 0.0, 0.0]])
    codes = SparseCodes.from_dense(dense)
    assert codes.k == 2
    assert torch.equal(codes.to_dense()[0], dense[0])
    assert codes.to_dense()[1].isnan().tolist() == [True, False, False, False]
    assert SparseCodes.from_dense(torch.zeros(3, 5)).k == 1


def test_codes_by_feature():
    codes, _ = make(3, 5)
    offsets, order = codes.by_feature()
    assert offsets.shape == (31,) and order.shape == (60,)
    flat = codes.indices.reshape(-1)
    for feature in range(30):
        slots = order[offsets[feature] : offsets[feature + 1]]
        assert torch.equal(slots, (flat == feature).nonzero()[:, 0])
    assert codes.by_feature()[1] is order, "sorted twice"


def test_codes_indexing():
    codes, dense = make(6, 5)
    mask = torch.rand(6, generator=torch.Generator().manual_seed(0)) > 0.5
    rows = torch.tensor([4, 0, 4])
    for index in (2, -1, slice(1, 4), rows, mask, (slice(None), 3), (rows, rows), (1, slice(2))):
        assert torch.equal(codes[index].to_dense(), dense[index])
    assert torch.equal(codes[mask.unsqueeze(1).expand(6, 5)].to_dense(), dense[mask].flatten(0, 1))
    assert len(codes) == 6 and codes[2].n_features == 30


@pytest.mark.parametrize(
    "index", [(0, 0, 0), (slice(None),) * 3, torch.ones(6, 5, 4, dtype=torch.bool), (..., 0)]
)
def test_codes_indexing_never_reaches_the_slots(index):
    with pytest.raises(IndexError, match="SparseCodes: expected at most 2 leading indices"):
        make(6, 5)[0][index]


def test_codes_to_and_detach():
    codes, dense = make(4)
    moved = codes.to(torch.float64)
    assert moved.values.dtype == torch.float64 and moved.indices.dtype == torch.int64
    assert torch.equal(moved.to_dense(), dense.double())
    assert codes.to("meta").indices.is_meta and codes.to("meta").values.is_meta
    tracked = SparseCodes(codes.values.requires_grad_(), codes.indices, 30)
    assert tracked.to_dense().requires_grad and not tracked.detach().values.requires_grad


def test_codes_carry_gradients():
    codes, dense = make(3, 4, dtype=torch.float64)
    tracked = SparseCodes(codes.values.requires_grad_(), codes.indices, 30)
    weight = randint(3, 4, 30, dtype=torch.float64)
    (tracked.to_dense() * weight).sum().backward()
    assert torch.equal(codes.values.grad, weight.gather(-1, codes.indices))
    source = dense.clone().requires_grad_()
    (SparseCodes.from_dense(source).to_dense() * weight).sum().backward()
    active = dense != 0
    assert torch.equal(source.grad[active], weight[active])


def test_by_feature_follows_indices_that_count_no_changes():
    """Those of inference mode, and a copy's, which begin to count anew."""
    with torch.inference_mode():
        codes = SparseCodes(torch.ones(3, 1), torch.tensor([[0], [1], [2]]), 4)
        assert codes.by_feature()[1].tolist() == [0, 1, 2]
        codes.indices.copy_(torch.tensor([[2], [1], [0]]))
        assert codes.by_feature()[1].tolist() == [2, 1, 0]
    codes = SparseCodes(torch.ones(3, 1), torch.tensor([[0], [1], [2]]).add_(0), 4)
    codes.by_feature()
    for twin in (copy.deepcopy(codes), pickle.loads(pickle.dumps(codes))):
        while twin.indices._version < codes.indices._version:
            twin.indices.copy_(torch.tensor([[2], [1], [0]]))
        twin.indices.copy_(torch.tensor([[2], [1], [0]]))
        assert twin.by_feature()[1].tolist() == [2, 1, 0]
        assert torch.equal(twin.values, codes.values) and twin.n_features == 4


@pytest.mark.parametrize("dtype", [np.bool_, np.uint8, torch.bool, torch.uint8])
def test_a_mask_of_any_kind_indexes_leading_dimensions(dtype):
    codes, _ = make(3, 4, k=4, n_features=9)
    mask = np.array([[True, False, False, True]] * 3)
    mask = mask.astype(dtype) if isinstance(dtype, type) else torch.from_numpy(mask).to(dtype)
    assert codes[mask].values.shape == (6, 4)
    for bad in (codes[0], codes[:, 0]):
        with pytest.raises(IndexError, match="expected at most 1 leading indices"):
            bad[mask[:, :4]]


@given(
    leading=st.lists(st.integers(0, 4), max_size=3),
    n_features=st.integers(1, 20),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_codes_round_trip_property(leading, n_features, seed, data):
    k = data.draw(st.integers(1, n_features), "k")
    codes, dense = make(*leading, k=k, n_features=n_features, seed=seed)
    assert torch.equal(codes.to_dense(), dense)
    assert torch.equal(SparseCodes.from_dense(dense).to_dense(), dense)
    assert int(codes.fired().sum()) == int(codes.l0().sum()) == int((dense != 0).sum())


@pytest.mark.parametrize(
    "values, indices, error, message",
    [
        (torch.ones(3, 2), torch.zeros(3, 1).long(), ValueError, r"got \[3, 2\] and \[3, 1\]"),
        (
            torch.ones(3, 2),
            torch.zeros(3, 2).int(),
            TypeError,
            "indices must be int64, got .*int32",
        ),
        (torch.ones(3, 2).long(), torch.zeros(3, 2).long(), TypeError, "values must be floating"),
        (torch.ones(()), torch.zeros(()).long(), ValueError, "at least one dimension"),
    ],
)
def test_codes_errors(values, indices, error, message):
    with pytest.raises(error, match=f"^SparseCodes: .*{message}"):
        SparseCodes(values, indices, 6)
