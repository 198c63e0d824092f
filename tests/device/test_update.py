# SPDX-License-Identifier: Apache-2.0
"""sae_update_ in Triton, against torch.optim.Adam with the gradients and the constraint by hand."""

import pytest
import torch
from oracle import assert_accurate, identical, unchanged
from update_cases import OUTPUTS, changed, operands, plain, run, scale_of_sums

from mikernels.kernels.sae import gradients_hot, update, update_wide
from mikernels.ops.sae.update import sae_update_op


@pytest.fixture(params=["", "chunks of 4", "3 programs", "wide"])
def route(request, monkeypatch):
    """Small sizes made to take the routes of large ones."""
    if request.param == "chunks of 4":
        monkeypatch.setattr(gradients_hot, "CHUNK", 4)
    elif request.param == "3 programs":
        monkeypatch.setattr(update, "MOST_PROGRAMS", 3)
    elif request.param == "wide":
        monkeypatch.setattr(update, "WIDEST", 0)
        monkeypatch.setattr(update_wide, "PIECE", 3)


def check(device, o, *, shadow=None, steps=2):
    with unchanged(o.values, o.indices, o.dy, o.x, o.w_dec, o.w_enc):
        settings = {"shadow": shadow, "steps": steps, "impl": "triton"}
        outputs, shadows = run(sae_update_op, o, device, **settings)
    oracle, eager = (plain(o, wide, steps=steps) for wide in (torch.float64, torch.float32))
    scales = [None] * 6 + list(scale_of_sums(o))
    for i, name in enumerate(OUTPUTS):
        if name.startswith("v_") and oracle[i].numel():
            # a square is twice as far off as what is squared
            scales[i] = 2 * oracle[i].abs().max().item()
    for result, exact, in_eager, scale in zip(outputs, oracle, eager, scales, strict=True):
        assert_accurate(result, exact, in_eager, scale=scale)
    return outputs, shadows


# no token, one number, one slot a token, more features than programs, a padded row
SHAPES = [(0, 3, 5, 2), (1, 1, 1, 1), (9, 17, 7, 1), (10, 33, 8, 3), (4, 130, 5, 2)]


@pytest.mark.parametrize("n, d, n_features, k", SHAPES)
def test_update_equals_gradients_and_torch_adam(device, dtype, route, n, d, n_features, k):
    check(device, operands(n, d, n_features, k, dtype, torch.float32))


@pytest.mark.parametrize("d", [300, 600, 1030, 2320, 2321])
def test_update_of_long_rows(device, d):
    check(device, operands(4, d, 3, 2, torch.float32, torch.float32), steps=1)


@pytest.mark.parametrize("project, unit_norm", [(False, False), (True, False), (False, True)])
def test_update_constraints(device, route, project, unit_norm):
    o = operands(10, 33, 8, 3, torch.float32, torch.float32)
    check(device, changed(o, project=project, unit_norm=unit_norm))


@pytest.mark.parametrize("shadow", [torch.float16, torch.bfloat16])
def test_update_of_low_precision_weights_and_shadows(device, dtype, route, shadow):
    o = operands(6, 17, 5, 2, torch.float32, dtype)
    outputs, shadows = check(device, o, shadow=shadow)
    for weight, copy in zip(outputs, shadows, strict=False):
        assert identical(copy, weight.to(shadow))


def test_update_of_features_without_slots_is_adam_with_no_gradient(device, route):
    o = operands(6, 17, 5, 2, torch.float32, torch.float32)
    outputs, _ = check(device, o)
    for name, output in zip(OUTPUTS, outputs, strict=True):
        if name[0] in "mv" or name == "db_enc":
            assert not output[1].any()
    assert torch.equal(outputs[1][1], o.w_enc[1])


def test_update_in_layouts_of_activations(device, route):
    o = operands(6, 17, 5, 2, torch.float32, torch.float32)
    expected, _ = run(sae_update_op, o, device, impl="triton")
    o = changed(o, values=o.values.T.contiguous().T, dy=o.dy.T.contiguous().T)
    o = changed(o, x=torch.stack([o.x, o.x], -1)[..., 0])
    actual, _ = check(device, o)
    # for other strides a GPU's compiler may sum in another order
    assert device == "cuda" or all(map(identical, actual, expected))


def test_update_of_a_zero_row_and_with_eps_0(device, route):
    """A zero row without gradient stays; 0 / 0 in a row without gradient is not in the others."""
    o = operands(6, 17, 5, 2, torch.float32, torch.float32)
    o.w_dec[1] = 0
    outputs, _ = run(sae_update_op, o, device, impl="triton")
    assert all(t.isfinite().all() for t in outputs) and not outputs[0][1].any()
    o = changed(o, eps=0.0, values=o.values + 1)
    outputs, _ = run(sae_update_op, o, device, impl="triton")
    idle = torch.bincount(o.indices.reshape(-1), minlength=5) == 0
    for output in outputs[:2]:
        assert torch.equal(output.isnan().any(-1), idle)


def test_update_is_one_function_of_its_input(device, route):
    o = operands(15, 33, 9, 4, torch.float32, torch.float32)
    first, _ = run(sae_update_op, o, device, impl="triton")
    assert all(map(identical, run(sae_update_op, o, device, impl="triton")[0], first))


def test_update_shows_nan_in_the_rows_it_reaches(device, route):
    o = operands(6, 17, 5, 2, torch.float32, torch.float32)
    o.values[2] = 0
    expected, _ = run(sae_update_op, o, device, impl="triton")
    o.dy[2], o.x[2] = float("nan"), float("inf")
    actual, _ = run(sae_update_op, o, device, impl="triton")
    assert all(map(identical, actual, expected))
    o.w_enc[3, 5] = float("nan")
    actual, _ = run(sae_update_op, o, device, steps=1, impl="triton")
    assert torch.equal(actual[1].isnan(), o.w_enc.isnan())


@pytest.mark.parametrize("name", ["w_enc", "shadow"])
def test_update_of_rows_that_are_not_there_raises(device, name):
    o = operands(6, 17, 5, 2, torch.float32, torch.float32)
    if name == "w_enc":
        o = changed(o, w_enc=o.w_enc[:3])
    else:
        o = changed(o, w_dec=o.w_dec.T.contiguous().T)
    message = r"sae_update_: (w_enc must be U\[F,d\]|.* must be contiguous)"
    with pytest.raises((RuntimeError, ValueError), match=message):
        run(sae_update_op, o, device, shadow=torch.float16, impl="triton")
