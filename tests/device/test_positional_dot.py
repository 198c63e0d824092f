# SPDX-License-Identifier: Apache-2.0
"""Dot products at positions in Triton; for the CPU: tests/ops/test_positional_dot.py."""

import pytest
import torch
from oracle import assert_accurate, far_and_near, identical, randint, randn, unchanged

from mikernels import _triton, positional_dot
from mikernels.ops.pairs.positional_dot import positional_dot_op

NAN, INF = float("nan"), float("inf")


def oracle(grads, vectors, positions, scale):
    dots = torch.einsum("bid,id->ib", grads[:, positions], vectors)
    return dots if scale is None else dots * scale[:, None]


def run(grads, vectors, positions, scale=None, out=None):
    if out is None:
        out = torch.zeros(vectors.shape[0], grads.shape[0], device=grads.device)
    with unchanged(grads, vectors, positions, scale):
        positional_dot_op(grads, vectors, positions, scale, out, impl="triton")
    return out


def check(grads, vectors, positions, scale=None):
    """Added to what was in `out`."""
    start = randn(vectors.shape[0], grads.shape[0], seed=9).to(grads.device)
    found = run(grads, vectors, positions, scale, start.clone())
    wide, narrow, sizes = (
        oracle(change(grads), change(vectors), positions, None if scale is None else change(scale))
        for change in (
            lambda t: t.double(),
            lambda t: t.float(),
            lambda t: t.double().abs().nan_to_num(0, 0, 0),
        )
    )
    # sums are fp32 whatever the operands: eager's fp32 is the yardstick
    assert_accurate(found, start.double() + wide, start + narrow, scale=sizes.max().item() + 1)


def operands(device, dtype, b, p, n, d, data=randn):
    grads, vectors = data(b, p, d, dtype=dtype), data(n, d, dtype=dtype, seed=1)
    positions = torch.randint(p, (n,), generator=torch.Generator().manual_seed(2))
    scale = data(n, dtype=dtype, seed=3)
    return [t.to(device) for t in (grads, vectors, positions, scale)]


# (B, P, n, d): one of each, empty positions, several tiles a position, several blocks of columns
SIZES = [(1, 1, 1, 1), (3, 40, 7, 17), (5, 2, 70, 33), (66, 3, 40, 80)]


@pytest.mark.parametrize("sizes", SIZES)
def test_positional_dot_is_accurate(device, dtype, sizes):
    grads, vectors, positions, scale = operands(device, dtype, *sizes)
    check(grads, vectors, positions)
    check(grads, vectors, positions, scale)


@pytest.mark.parametrize("n", [32, 33, 64, 65])
@pytest.mark.parametrize("position", [0, 2])
def test_vectors_of_one_position(device, n, position):
    """The first and the last, in tiles that are full and in one that is not."""
    grads, vectors, positions, scale = operands(device, torch.float32, 2, 3, n, 8)
    check(grads, vectors, torch.full_like(positions, position), scale)
    positions[:] = torch.arange(n).flip(0) % 2 * position
    check(grads, vectors, positions, scale)


LAYOUTS = {
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "strided": lambda t: torch.stack([t, t + 1], -1)[..., 0],
    "padded": lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_positional_dot_layouts(device, layout):
    given = operands(device, torch.float16, 3, 4, 20, 16, randint)
    expected = run(*given)
    for i in range(4):
        args = [LAYOUTS[layout](t) if i == j else t for j, t in enumerate(given)]
        assert identical(run(*args), expected)
    out = torch.zeros(3, 20, 2, device=device)[..., 0].T
    assert identical(run(*given, out=out), expected)


def test_positional_dot_of_expanded_operands(device):
    grads, vectors, positions, scale = operands(device, torch.float32, 3, 4, 20, 16, randint)
    for thin in (grads[:1], grads[:, :1], grads[..., :1]):
        wide = thin.expand(grads.shape)
        args = vectors, positions, scale
        assert identical(run(wide, *args), run(wide.contiguous(), *args))
    args = vectors[:1].expand(20, 16), positions[:1].expand(20), scale[:1].expand(20)
    assert identical(run(grads, *args), run(grads, *(t.contiguous() for t in args)))


@pytest.mark.parametrize("axis", [0, 2, 3])
def test_positional_dot_of_nothing(device, axis):
    sizes = [2, 3, 4, 5]
    sizes[axis] = 0
    given = operands(device, torch.float32, *sizes)
    start = randn(sizes[2], sizes[0], seed=9).to(device)
    assert identical(run(*given, out=start.clone()), start)
    nowhere = torch.zeros(sizes[0], 0, sizes[3], device=device)
    empty = run(nowhere, given[1][:0], given[2][:0])
    assert empty.shape == (0, sizes[0])


def test_nan_stays_with_its_vectors_and_positions(device):
    grads, vectors, positions, scale = operands(device, torch.float32, 3, 4, 20, 16, randint)
    positions[5], grads[1, 2, 3], vectors[5, 4], scale[7] = 0, NAN, INF, NAN
    check(grads, vectors, positions)
    check(grads, vectors, positions, scale)
    expected = torch.zeros(20, 3, dtype=torch.bool, device=device)
    expected[:, 1], expected[7] = positions == 2, True
    expected[5] = run(grads, vectors, positions, scale)[5].isnan()
    assert torch.equal(run(grads, vectors, positions, scale).isnan(), expected)


@pytest.mark.parametrize("axis", range(3))
def test_positional_dot_beyond_2_to_the_31_elements(device, axis):
    far, near = far_and_near(device, 2, axis)
    b, p, d = near.shape
    _, vectors, positions, _ = operands(device, torch.float16, b, p, 7, d)
    assert identical(run(far, vectors, positions), run(near, vectors, positions))


@pytest.mark.parametrize("axis", range(2))
def test_vectors_beyond_2_to_the_31_elements(device, axis):
    far, near = far_and_near(device, 1, axis)
    grads, _, positions, scale = operands(device, torch.float16, 3, 2, *near.shape)
    assert identical(run(grads, far, positions, scale), run(grads, near, positions, scale))


def test_positional_dot_is_deterministic(device):
    given = operands(device, torch.float32, 5, 4, 50, 70)
    first = run(*given)
    for _ in range(1 if _triton.interpreting() else 20):
        assert identical(run(*given), first)


def test_positional_dot_with_more_positions_than_int16(device):
    """The sort's keys are as wide as positions need."""
    grads, vectors, positions, scale = operands(device, torch.float32, 1, 2**15 + 1, 3, 2, randint)
    positions[:] = torch.tensor([2**15, 0, 2**15])
    found = positional_dot(grads, vectors, positions, scale=scale, impl="triton")
    assert identical(found, oracle(grads, vectors, positions, scale))
