# SPDX-License-Identifier: Apache-2.0
"""The by-feature operators in Triton; for the CPU: tests/ops/test_gradients.py."""

from functools import partial

import gradient_cases
import numpy as np
import pytest
import torch
from gradient_cases import feature_sum, gather_dot
from oracle import assert_accurate, identical, randint, randn, random_indices, unchanged

from mikernels import _triton
from mikernels.kernels.common.launch import power_of_two
from mikernels.kernels.sae import gradients_hot, gradients_sum
from mikernels.ops.sae.gradients import (
    by_feature_op,
    by_feature_reference,
    feature_sum_op,
    gather_dot_op,
    sae_gradients_op,
    weighted_row_sum_op,
)


@pytest.fixture(params=[512, 4], ids=["", "chunks of 4"])
def chunk(request, monkeypatch):
    monkeypatch.setattr(gradients_hot, "CHUNK", request.param)


@pytest.fixture(params=["", "blocks"])
def blocks(request, monkeypatch):
    """Rows of more than 4 numbers in 2 to 4 blocks of columns."""
    if request.param:
        tiles = {2**bits: (4, 1) for bits in range(2, 10)}
        monkeypatch.setattr(gradients_sum, "SUM_TILES", tiles)
        columns = lambda n, d, itemsize: max(4, power_of_two(d) // 4)  # noqa: E731
        monkeypatch.setattr(gradients_sum, "columns_of", columns)


def on(device, *tensors):
    """Copies on the device that keep their strides."""
    return [t if t is None else t.to(device) for t in tensors]


@pytest.fixture(params=["triton"] if _triton.interpreting() else ["triton", "cuda"])
def sort(request):
    """by_feature, by Triton's launcher or in CUDA C++."""
    if by_feature_op.backends()[request.param] != "ready":
        pytest.skip(by_feature_op.backends()[request.param])
    return partial(by_feature_op, impl=request.param)


@pytest.mark.parametrize(
    "m, n_features", [(0, 0), (0, 7), (1, 1), (97, 13), (900, 70_000), (500, 3), (9000, 300_000)]
)
def test_by_feature(device, sort, m, n_features):
    indices = torch.randint(max(n_features, 1), (m,), generator=torch.Generator().manual_seed(m))
    for i in (indices, torch.stack([indices, indices + 5], 1)[:, 0]):
        (given,) = on(device, i)
        with unchanged(given):
            actual = sort(given, n_features)
        for a, e in zip(actual, by_feature_reference(indices, n_features), strict=True):
            assert identical(a.cpu(), e)


@pytest.mark.parametrize("n_features", [2**15 - 1, 2**15, 2**15 + 1])
def test_by_feature_of_the_last_feature(device, sort, n_features):
    indices = torch.tensor([n_features - 1, 0, n_features - 1, 5])
    actual = sort(*on(device, indices), n_features)
    for a, e in zip(actual, by_feature_reference(indices, n_features), strict=True):
        assert identical(a.cpu(), e)


def test_by_feature_of_crowds(device, sort):
    n = 5_000 if _triton.interpreting() else 1_500_000
    for indices in (torch.full((n,), 7), torch.arange(n) % 3 * 4000, -torch.arange(n) % 9001):
        actual = sort(*on(device, indices), 9001)
        for a, e in zip(actual, by_feature_reference(indices, 9001), strict=True):
            assert identical(a.cpu(), e)


SHAPES = [(0, 3, 5, 2), (1, 1, 1, 1), (13, 17, 11, 1), (11, 130, 9, 5), (5, 600, 9, 3)]
LAYOUTS = {
    "transposed": lambda t: t.mT.contiguous().mT,
    "strided": lambda t: torch.stack([t, t + 1], -1)[..., 0],
    "padded rows": lambda t: torch.cat([t, t], -1)[:, : t.shape[1]],
}


@pytest.mark.parametrize("n, d, n_features, k", [*SHAPES, (2, 1100, 20, 11), (3, 64, 50, 37)])
def test_gather_dot(device, dtype, n, d, n_features, k):
    rows, w = randn(n, d, dtype=dtype), randn(n_features, d, dtype=dtype, seed=1)
    indices = random_indices(n, k, n_features)
    given = on(device, rows, w, indices)
    with unchanged(*given):
        out = gather_dot_op(*given, None, None, impl="triton")
    oracle = gather_dot(rows.double(), w.double(), indices)
    assert_accurate(out.cpu(), oracle, gather_dot(rows, w, indices))
    for layout in LAYOUTS.values() if d < 500 else ():
        strided = gather_dot_op(*map(layout, given), None, None, impl="triton")
        assert_accurate(strided.cpu(), oracle, gather_dot(rows, w, indices))
        # for other strides a GPU's compiler may sum in another order
        assert device == "cuda" or identical(strided, out)
    expanded = rows[:, :1].expand(n, d)
    actual = gather_dot_op(*on(device, expanded, w, indices), None, None, impl="triton")
    assert_accurate(
        actual.cpu(),
        gather_dot(expanded.double(), w.double(), indices),
        gather_dot(expanded, w, indices),
    )


def hot_indices(n, k, n_features):
    """[n, k] features, the last of them in every row, and feature 1 (if there is one) in none."""
    indices = random_indices(n, k, n_features)
    indices[:, 0] = n_features - 1
    return indices.masked_fill(indices == 1, 0)


@pytest.mark.parametrize("n, d, n_features, k", [*SHAPES, (6, 1100, 5, 2)])
def test_feature_sum(device, dtype, chunk, n, d, n_features, k):
    coefficients, rows = randn(n, k, dtype=dtype), randn(n, d, dtype=dtype, seed=1)
    indices = hot_indices(n, k, n_features)
    slots = by_feature_reference(indices.reshape(-1), n_features)
    given = on(device, coefficients, rows, *slots)
    with unchanged(*given):
        actual = feature_sum_op(*given, None, impl="triton")
    oracle = feature_sum(coefficients.double(), rows.double(), indices, n_features)
    eager = feature_sum(coefficients, rows, indices, n_features)
    for result, exact, in_eager in zip(actual, oracle, eager, strict=True):
        assert_accurate(result.cpu(), exact, in_eager)
    for layout in LAYOUTS.values() if n < 12 and d < 500 else ():
        strided = feature_sum_op(*map(layout, given[:2]), *given[2:], None, impl="triton")
        for result, exact, in_eager in zip(strided, oracle, eager, strict=True):
            assert_accurate(result.cpu(), exact, in_eager)
        assert device == "cuda" or all(map(identical, strided, actual))


def test_feature_sum_leaves_out_rows_of_zero_coefficients(device, chunk):
    coefficients, rows, indices = randint(10, 3), randint(10, 7), hot_indices(10, 3, 11)
    coefficients[5] = 0
    expected = feature_sum(coefficients, rows, indices, 11)
    rows[5] = float("nan")
    given = on(device, coefficients, rows, *by_feature_reference(indices.reshape(-1), 11))
    for a, e in zip(feature_sum_op(*given, None, impl="triton"), expected, strict=True):
        assert identical(a.cpu(), e)


def test_sums_of_a_feature_of_every_token_are_no_long_chains(device):
    """Against one product of all 2,048 positive terms, which sums in blocks as a BLAS does."""
    coefficients, rows = randn(2048, 1).abs(), randn(2048, 260, seed=1).abs()
    slots = by_feature_reference(torch.zeros(2048, dtype=torch.int64), 1)
    dw, db = feature_sum_op(*on(device, coefficients, rows, *slots), None, impl="triton")
    exact = coefficients.double().T @ rows.double()
    # 2 roundings of the largest sum, whatever the yardstick's luck
    assert_accurate(dw.cpu(), exact, exact)
    assert_accurate(db.cpu(), coefficients.double().sum(0), coefficients.sum(0))


@pytest.mark.parametrize("n_features, d", [(0, 3), (3, 0), (1, 1), (300, 7), (131, 600)])
def test_weighted_row_sum(device, dtype, n_features, d):
    weights, rows = randn(n_features), randn(n_features, d, dtype=dtype, seed=1)
    exact, eager = (weights.to(t) @ rows.to(t) for t in (torch.float64, torch.float32))
    for layout in (lambda t: t, *LAYOUTS.values()):
        given = on(device, weights, layout(rows))
        with unchanged(*given):
            out = weighted_row_sum_op(*given, impl="triton")
        assert out.dtype == torch.float32
        if d:
            assert_accurate(out.cpu(), exact, eager)


def sae_operands(n, d, n_features, k, dtype, data=randn):
    values, indices = data(n, k, dtype=dtype).relu(), hot_indices(n, k, n_features)
    dy, x, w_dec = (
        data(rows, d, dtype=dtype, seed=seed) for seed, rows in enumerate((n, n, n_features), 1)
    )
    return (
        values,
        indices,
        *by_feature_reference(indices.reshape(-1), n_features),
        None,
        dy,
        x,
        w_dec,
    )


def run(device, operands, start=None, impl="triton"):
    """sae_gradients_ into fp32 buffers: fresh ones, or added to `start`."""
    n_features, d = operands[-1].shape
    if start is None:
        out = [torch.empty(shape) for shape in ((n_features, d), (n_features, d), (n_features,))]
    else:
        out = [t.clone() for t in start]
    out, given = on(device, *out), on(device, *operands)
    with unchanged(*given):
        sae_gradients_op(*given, None, None, *out, start is not None, impl=impl)
    return [t.cpu() for t in out]


def plain(values, indices, dy, x, w_dec, start):
    dv = torch.where(values != 0, gather_dot(dy, w_dec, indices), 0)
    dw_dec, _ = feature_sum(values, dy, indices, w_dec.shape[0])
    results = dw_dec, *feature_sum(dv, x, indices, w_dec.shape[0])
    return results if start is None else [r + s for r, s in zip(results, start, strict=True)]


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("n, d, n_features, k", [*SHAPES, (6, 1030, 5, 2)])
def test_sae_gradients(device, dtype, chunk, n, d, n_features, k, accumulate):
    operands = sae_operands(n, d, n_features, k, dtype)
    start = [randn(n_features, d), randn(n_features, d, seed=1), randn(n_features, seed=2)]
    values, indices, _, _, _, dy, x, w_dec = operands
    # sums are kept in fp32 buffers: eager's fp32 is the yardstick, whatever the operands' dtype
    oracle, eager = (
        plain(
            *(t.to(wide) if t.is_floating_point() else t for t in (values, indices, dy, x, w_dec)),
            [t.to(wide) for t in start] if accumulate else None,
        )
        for wide in (torch.float64, torch.float32)
    )
    actual = run(device, operands, start if accumulate else None)
    for result, exact, in_eager in zip(actual[:2], oracle, eager, strict=False):
        assert_accurate(result, exact, in_eager)
    # db_enc is few numbers in which large terms cancel, and eager torch may hit them by luck
    dv = gather_dot(dy.double().abs(), w_dec.double().abs(), indices).masked_fill(values == 0, 0)
    scale = feature_sum(dv, x.double(), indices, n_features)[1].max().item()
    assert_accurate(actual[2], oracle[2], eager[2], scale=scale)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sae_gradients_layouts(device, chunk, blocks, layout):
    n_features, d = 5, 8
    operands = sae_operands(6, d, n_features, 2, torch.float16, randint)
    dense = run(device, operands)
    strided = [t if t is None or t.dim() < 2 else LAYOUTS[layout](t) for t in operands]
    assert all(map(identical, run(device, strided), dense))
    shapes = (n_features, d), (n_features, d), (n_features, 1)
    out = [LAYOUTS[layout](torch.empty(shape)).to(device) for shape in shapes]
    out[2] = out[2][:, 0]
    sae_gradients_op(*on(device, *operands), None, None, *out, False, impl="triton")
    assert all(map(identical, (t.cpu() for t in out), dense))


def test_sae_gradients_of_an_expanded_gradient(device):
    operands = list(sae_operands(12, 8, 13, 5, torch.float32, randint))
    operands[5] = operands[5][:1, :1].expand(12, 8)
    operands[6] = operands[6][:1].expand(12, 8)
    expected = run(device, [t if t is None else t.contiguous() for t in operands])
    given = on(device, *operands[:5])
    given += [t[:1, :1].to(device).expand(12, 8) for t in operands[5:6]]
    given += [t[:1].to(device).expand(12, 8) for t in operands[6:7]]
    out = [torch.empty(t.shape, device=device) for t in expected]
    sae_gradients_op(*given, operands[7].to(device), None, None, *out, False, impl="triton")
    assert all(map(identical, (t.cpu() for t in out), expected))


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_sae_gradients_with_a_low_precision_shadow_of_the_decoder(device, low):
    operands = list(sae_operands(9, 17, 11, 3, torch.float32, randint))
    expected = run(device, operands)
    operands[-1] = operands[-1].to(low)
    assert all(map(identical, run(device, operands), expected))


def test_sae_gradients_of_slots_whose_value_is_zero(device, chunk, blocks):
    """NaN and inf in rows that no value selects stay out; a NaN value is in its feature's rows."""
    operands = sae_operands(10, 8, 7, 3, torch.float32, randint)
    values, indices, _, _, _, dy, x, w_dec = operands
    values[7] = 0
    values[3, 1] = 1
    values[indices == 4] = 0
    expected = run(device, operands)
    dy[7], x[7], w_dec[4] = float("nan"), float("inf"), float("nan")
    assert all(map(identical, run(device, operands), expected))
    values[3, 1] = float("nan")
    hit = torch.zeros(7, dtype=torch.bool).index_fill_(0, indices[3, 1], True)
    actual = run(device, operands)
    assert torch.equal(actual[0].isnan(), (dy[3] * values[3, 1]).isnan() & hit[:, None])
    for a, e in zip(actual[1:], expected[1:], strict=True):
        assert identical(a, e)


def test_sae_gradients_are_one_function_of_their_input(device, chunk):
    operands = sae_operands(15, 33, 9, 4, torch.float32)
    first = run(device, operands)
    assert all(map(identical, run(device, operands), first))


@pytest.mark.parametrize("form", gradient_cases.FORMS)
def test_sae_gradients_of_levels_widths_and_given_gradients(device, dtype, chunk, form):
    for number, sizes in enumerate(gradient_cases.WIDTHS):
        o = gradient_cases.operands(*sizes, dtype, **gradient_cases.FORMS[form])
        gradient_cases.check(o, "triton", device, accumulate=number % 2 == 1)


def test_sae_gradients_of_levels_layouts(device, chunk, blocks):
    gradient_cases.check_layouts(torch.float32, "triton", device)


def test_sae_gradients_read_what_is_selected(device, chunk, blocks):
    gradient_cases.check_skips("triton", device)


def test_one_level_is_none(device, dtype, chunk):
    gradient_cases.check_one_level_is_none(dtype, "triton", device)


@pytest.mark.parametrize("levels", [0, 3])
def test_given_dots_are_the_dots(device, dtype, levels):
    gradient_cases.check_given_dots(dtype, "triton", device, levels)


def test_gather_dot_by_level(device, dtype):
    gradient_cases.check_dots_by_level(dtype, "triton", device)


def test_levels_outside_count_as_the_nearest(device, chunk, blocks):
    o = gradient_cases.operands(12, 8, 5, 9, 2, torch.float32, levels=3)
    dots = [t.to(device) for t in (o.dy, o.w_dec, o.indices)]
    expected = o.run("triton", device)
    by_level = gather_dot_op(*dots, None, o.levels.to(device), impl="triton")
    o.levels[o.levels == 0] = -(2**40)
    o.levels[o.levels == 2] = 2**40
    assert all(map(identical, o.run("triton", device), expected))
    found = gather_dot_op(*dots, None, o.levels.to(device), impl="triton")
    assert identical(found, by_level)


def test_rows_beyond_2_to_the_31_elements(device):
    """Row 1 of every matrix begins after 2^31 elements of one lazily mapped allocation."""
    far, d = 2**31 + 8, 5
    if device == "cpu":  # torch.empty would touch every page, to poison it
        base = torch.from_numpy(np.empty(far + 256, np.float16))
    else:
        base = torch.empty(far + 256, dtype=torch.float16, device=device)
    names = "dy", "x", "w_dec", "dw_dec", "dw_enc"
    view = {n: base.as_strided((2, d), (far, 1), 32 * i) for i, n in enumerate(names)}
    near = {n: randint(2, d, seed=i).half().to(device) for i, n in enumerate(names)}
    for n in names:
        view[n].copy_(near[n])
    values = torch.tensor([[1.0, 2.0], [3.0, -1.0]], dtype=torch.float16)
    indices = torch.tensor([[0, 1], [1, 0]])
    given = on(device, values, indices, *by_feature_reference(indices.reshape(-1), 2), None)
    bias = torch.empty(2, device=device)
    for operands in (view, near):
        *rows, dw_dec, dw_enc = (operands[n] for n in names)
        sae_gradients_op(*given, *rows, None, None, dw_dec, dw_enc, bias, False, impl="triton")
    assert all(identical(view[n], near[n]) for n in names)
    for operands in (view, near):
        dots = gather_dot_op(operands["dy"], operands["w_dec"], given[1], None, None, impl="triton")
        sums, _ = feature_sum_op(given[0], operands["dy"], *given[2:], impl="triton")
        assert identical(dots.cpu(), gather_dot(near["dy"].cpu(), near["w_dec"].cpu(), indices))
        assert identical(sums, near["dw_dec"])
