# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from oracle import assert_accurate, far_apart, identical, randint, randn, unchanged

from mikernels import _triton
from mikernels.ops.pairs.block_norms import block_norms, block_norms_op, reference

NAN, INF = float("nan"), float("inf")


def oracle(a, b):
    return torch.einsum("ird,jds->ijrs", a, b).square().sum((2, 3)).sqrt()


def check(a, b):
    with unchanged(a, b):
        norms = block_norms(a, b, impl="triton")
    assert norms.dtype == torch.float32
    assert_accurate(norms.cpu(), oracle(*(x.cpu().double() for x in (a, b))), reference(a, b).cpu())


# several matrices a tile, and matrices of more rows and columns than a tile
SIZES = [
    (3, 5, 7, 4, 6),
    (1, 1, 1, 1, 1),
    (2, 16, 40, 9, 64),
    (9, 3, 33, 5, 1),
    (2, 130, 5, 2, 140),
]


@pytest.mark.parametrize("n, r, d, m, s", SIZES)
def test_block_norms_are_accurate(device, dtype, n, r, d, m, s):
    a, b = randn(n, r, d, dtype=dtype).to(device), randn(m, d, s, dtype=dtype, seed=1).to(device)
    check(a, b)


def test_block_norms_of_nothing(device, dtype):
    for n, r, d, m, s in ((0, 3, 2, 4, 3), (3, 0, 2, 4, 3), (3, 2, 0, 4, 3), (3, 2, 2, 4, 0)):
        a, b = (torch.empty(size, dtype=dtype, device=device) for size in ((n, r, d), (m, d, s)))
        norms = block_norms(a, b, impl="triton")
        assert norms.shape == (n, m) and not norms.any()


def test_block_norms_layouts(device):
    a, b = randn(6, 20, 24).to(device), randn(5, 24, 12, seed=1).to(device)
    check(a[::2, 1:, ::3], b[1:, ::3, ::2])
    check(a.movedim(0, 2)[:, :6], b[:1].expand(4, 24, 12)[:, :6])
    check(a, b.transpose(1, 2).contiguous().transpose(1, 2))


def test_block_norms_of_integers_are_exact(device):
    a, b = randint(5, 7, 9).to(device), randint(4, 9, 8, seed=1).to(device)
    exact = oracle(*(x.cpu().double() for x in (a, b))).float()
    assert identical(block_norms(a, b, impl="triton").cpu(), exact)


def test_block_norms_non_finite(device):
    """Only the pairs that hold them, also where a tile is padded."""
    a, b = randn(5, 6, 7).to(device), randn(4, 7, 3, seed=1).to(device)
    a[2], b[1, 3, 2], b[3, 0, 0] = a[2].abs(), NAN, INF
    b[3] = b[3].abs()
    check(a, b)
    a[4, 5, 6] = -INF
    check(a, b)


def test_block_norms_beyond_2_to_the_31_elements(device):
    a, b = randn(2, 20).half().to(device), randn(2, 20, seed=1).half().to(device)
    for left, right in (
        (lambda x: x[:, None], lambda x: x[:, :, None]),
        (lambda x: x[None], lambda x: x[None].transpose(1, 2)),
        (lambda x: x.T[None], lambda x: x[None]),
    ):
        near = block_norms_op(left(a), right(b), impl="triton")
        far = block_norms_op(left(far_apart(a)), right(far_apart(b)), impl="triton")
        assert identical(near, far)


def test_block_norms_are_deterministic(device):
    a, b = randn(4, 20, 40).to(device), randn(3, 40, 33, seed=1).to(device)
    first = block_norms(a, b, impl="triton")
    for _ in range(1 if _triton.interpreting() else 20):
        assert identical(block_norms(a, b, impl="triton"), first)
