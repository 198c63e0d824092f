# SPDX-License-Identifier: Apache-2.0
import dataclasses

import pytest
import torch
from oracle import randint

from mikernels import Interactions, pairwise_topk

FOUND = Interactions(
    values=torch.tensor([-3.0, 2.0, 2.0]),
    rows=torch.tensor([1, 0, 3]),
    cols=torch.tensor([4, 2, 0]),
    shape=(4, 5),
)
NOTHING = Interactions(torch.empty(0), *torch.empty(2, 0, dtype=torch.int64), shape=(0, 5))


def test_interactions_to_dense():
    dense = torch.zeros(4, 5)
    dense[1, 4], dense[0, 2], dense[3, 0] = -3, 2, 2
    assert len(FOUND) == 3 and torch.equal(FOUND.to_dense(), dense)
    coo = FOUND.to_coo()
    assert coo.is_sparse and coo.is_coalesced() and coo.shape == (4, 5)
    assert torch.equal(coo.to_dense(), dense)
    assert torch.equal(coo.indices(), torch.tensor([[0, 1, 3], [2, 4, 0]]))


def test_interactions_of_nothing():
    assert len(NOTHING) == 0 and NOTHING.to_dense().shape == (0, 5)
    assert NOTHING.to_coo().shape == (0, 5) and NOTHING.to_coo().coalesce().values().numel() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_interactions_of_every_pair_are_the_matrix(dtype):
    a, b = randint(7, 4, dtype=dtype), randint(9, 4, dtype=dtype, seed=1)
    found = pairwise_topk(a, b, k=63)
    assert torch.equal(found.to_dense(), a @ b.T) and found.to_dense().dtype == dtype
    assert torch.equal(found.to_coo().to_dense(), a @ b.T)
    assert torch.equal(pairwise_topk(a, k=99, upper=True).to_dense(), (a @ a.T).triu(1))


def test_interactions_do_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        FOUND.values = torch.zeros(3)


@pytest.mark.parametrize(
    "change, got",
    [
        ({"rows": FOUND.rows[:2]}, r"\[3\], \[2\] and \[3\]"),
        ({"values": FOUND.values[:, None]}, r"\[3, 1\], \[3\] and \[3\]"),
        ({"cols": FOUND.cols[0]}, r"\[3\], \[3\] and \[\]"),
    ],
)
def test_interactions_errors(change, got):
    message = f"values, rows and cols must be .* of one k, got {got}"
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(FOUND, **change)


def test_interactions_outside_their_matrix_are_no_sparse_tensor():
    with pytest.raises(ValueError, match=r"Interactions: cols must be in 0\.\.3, got 4"):
        dataclasses.replace(FOUND, shape=(4, 4))
    negative = Interactions(FOUND.values, FOUND.rows.clone(), FOUND.cols, FOUND.shape)
    negative.rows[0] = -1
    with pytest.raises(ValueError, match="Interactions: rows must be in .* got -1"):
        negative.to_dense()
    with pytest.raises(RuntimeError, match="size|ind"):
        negative.to_coo()
    with pytest.raises(TypeError, match=r"Interactions: rows must be int64, got torch.int32"):
        dataclasses.replace(FOUND, rows=FOUND.rows.int())
    with pytest.raises(ValueError, match="Interactions: shape must be at least 0, got -1"):
        dataclasses.replace(FOUND, shape=(-1, 4))
