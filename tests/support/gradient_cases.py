# SPDX-License-Identifier: Apache-2.0
"""The by-feature operators in plain torch, and checks of their optional operands."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from oracle import assert_accurate, identical, randint, randn, random_indices, unchanged

from mikernels import by_feature
from mikernels.ops.sae.gradients import gather_dot_op, sae_gradients_op


def gather_dot(rows, w, indices):
    return (rows[:, None] * w[indices]).sum(-1)


def feature_sum(coefficients, rows, indices, n_features):
    dw = rows.new_zeros(n_features, rows.shape[1])
    terms = coefficients[..., None] * rows[:, None]
    dw.index_add_(0, indices.reshape(-1), terms.flatten(0, 1))
    db = rows.new_zeros(n_features).index_add_(0, indices.reshape(-1), coefficients.reshape(-1))
    return dw, db


@dataclass
class Operands:
    """Of sae_gradients_; the last feature is in every row, and with levels dy is [L, N, d_out]."""

    values: torch.Tensor
    indices: torch.Tensor
    dy: torch.Tensor
    x: torch.Tensor
    w_dec: torch.Tensor
    levels: torch.Tensor | None
    d_pre: torch.Tensor | None

    def plain(self, dtype):
        """dw_dec, dw_enc, db_enc, every step in `dtype`."""
        values, dy, x = (t.to(dtype) for t in (self.values, self.dy, self.x))
        rows, f = self.rows().to(dtype), len(self.w_dec)
        dv = self.dv(dtype)
        dw_dec = rows.new_zeros(f, dy.shape[-1]).index_add_(
            0, self.indices.reshape(-1), (values[..., None] * rows).flatten(0, 1)
        )
        return dw_dec, *feature_sum(dv, x, self.indices, f)

    def rows(self):
        """[N, k, d_out]: the row of dy that each slot takes."""
        n, k = self.values.shape
        if self.levels is None:
            return self.dy[:, None].expand(n, k, self.dy.shape[-1])
        return self.dy[self.levels[self.indices], torch.arange(n)[:, None]]

    def dv(self, dtype, absolute=False):
        if self.d_pre is not None:
            return self.d_pre.to(dtype)
        terms = self.rows().to(dtype) * self.w_dec.to(dtype)[self.indices]
        dots = (terms.abs() if absolute else terms).sum(-1)
        return torch.where(self.values != 0, dots, 0)

    def run(self, impl, device="cpu", start=None):
        """Into fp32 buffers: fresh ones, or added to `start`."""
        f, d_out, d_in = len(self.w_dec), self.dy.shape[-1], self.x.shape[1]
        if start is None:
            out = [torch.empty(shape) for shape in ((f, d_out), (f, d_in), (f,))]
        else:
            out = [t.clone() for t in start]
        slots = by_feature(self.indices.reshape(-1), f)
        given = self.values, self.indices, *slots, None, self.dy, self.x, self.w_dec
        given = [t if t is None else t.to(device) for t in (*given, self.levels, self.d_pre)]
        out = [t.to(device) for t in out]
        with unchanged(*given):
            sae_gradients_op(*given, *out, start is not None, impl=impl)
        return [t.cpu() for t in out]


def operands(n, d_out, d_in, f, k, dtype, *, levels=0, given=False, data=randn):
    """`levels` is L, or 0 for none; `given` is whether d_pre is, which has zeros of its own."""
    indices = random_indices(n, k, f)
    indices[:, 0] = f - 1
    d_pre = data(n, k, dtype=dtype, seed=4)
    d_pre[1::2, -1] = 0
    return Operands(
        data(n, k, dtype=dtype).relu(),
        indices,
        data(*([levels] if levels else []), n, d_out, dtype=dtype, seed=1),
        data(n, d_in, dtype=dtype, seed=2),
        data(f, d_out, dtype=dtype, seed=3),
        torch.arange(f) * 7 % levels if levels else None,
        d_pre if given else None,
    )


# n, d_out, d_in, F, k
WIDTHS = [
    (0, 3, 4, 5, 2),
    (1, 1, 2, 1, 1),
    (13, 17, 5, 11, 3),
    (13, 5, 70, 11, 3),
    (9, 130, 66, 20, 7),
    (5, 64, 64, 9, 3),
    (4, 0, 6, 5, 2),
    (4, 6, 0, 5, 2),
]
FORMS = {
    "widths": {},
    "levels": {"levels": 3},
    "given": {"given": True},
    "levels, given": {"levels": 3, "given": True},
}


def check(o: Operands, impl, device="cpu", accumulate=False):
    f, d_out, d_in = len(o.w_dec), o.dy.shape[-1], o.x.shape[1]
    start = [randn(f, d_out, seed=5), randn(f, d_in, seed=6), randn(f, seed=7)]
    found = o.run(impl, device, start if accumulate else None)
    # sums are kept in fp32 buffers: eager's fp32 is the yardstick, whatever the operands' dtype
    exact, eager = (
        [r + s.to(t) if accumulate else r for r, s in zip(o.plain(t), start, strict=True)]
        for t in (torch.float64, torch.float32)
    )
    for a, e, in_eager in zip(found[:2], exact, eager, strict=False):
        if e.numel():
            assert_accurate(a, e, in_eager)
    # db_enc is few numbers in which large terms cancel, and eager torch may hit them by luck
    magnitudes = o.dv(torch.float64, absolute=True).abs().reshape(-1)
    scale = magnitudes.new_zeros(f).index_add_(0, o.indices.reshape(-1), magnitudes).max()
    assert_accurate(found[2], exact[2], eager[2], scale=max(scale.item(), 1.0))


def check_layouts(dtype, impl, device="cpu"):
    """Exact sums of strided and expanded operands."""
    for form in FORMS.values():
        o = operands(6, 8, 5, 9, 2, dtype, data=randint, **form)
        expected = o.run(impl, device)
        exact = o.plain(torch.float64)
        assert all(identical(a, e.float()) for a, e in zip(expected, exact, strict=True))
        for layout in (
            lambda t: t.mT.contiguous().mT,
            lambda t: torch.stack([t, t + 1], -1)[..., 0],
        ):
            strided = {n: layout(t) for n, t in vars(o).items() if t is not None and t.dim() > 1}
            if o.levels is not None:
                strided["levels"] = torch.stack([o.levels, o.levels + 1], 1)[:, 0]
            other = Operands(**{**vars(o), **strided})
            assert all(map(identical, other.run(impl, device), expected))
        o.dy = o.dy[..., :1, :1].expand(o.dy.shape)
        exact = o.plain(torch.float64)
        found = o.run(impl, device)
        assert all(identical(a, e.float()) for a, e in zip(found, exact, strict=True))


def check_skips(impl, device="cpu"):
    """What no value and no given gradient selects is not read."""
    nan = float("nan")
    o = operands(10, 8, 5, 7, 3, torch.float32, levels=2, given=True, data=randint)
    assert o.d_pre is not None and o.levels is not None
    o.values[7], o.d_pre[7] = 0, 3
    o.values[4], o.d_pre[4] = 2, 0
    o.values[5], o.d_pre[5] = 0, 0
    expected = o.run(impl, device)
    exact = o.plain(torch.float64)
    assert all(identical(a, e.float()) for a, e in zip(expected, exact, strict=True))
    o.dy[:, 7], o.x[4], o.dy[:, 5], o.x[5], o.w_dec[:] = nan, nan, nan, nan, nan
    # and no row of another level is
    o.dy[0, 2] = nan
    o.values[2][o.levels[o.indices[2]] == 0] = 0
    o.values[2][o.levels[o.indices[2]] == 1] = 1
    found = o.run(impl, device)
    o.dy[0, 2] = 1
    clean = o.run(impl, device)
    assert all(map(identical, found, clean)) and all(t.isfinite().all() for t in found)
    o.d_pre[1, 0] = nan
    found = o.run(impl, device)
    hit = int(o.indices[1, 0])
    assert found[1][hit].isnan().all() and found[2][hit].isnan() and found[0].isfinite().all()


def check_one_level_is_none(dtype, impl, device="cpu"):
    for given in (False, True):
        plain = operands(23, 33, 33, 15, 4, dtype, given=given)
        levelled = Operands(**{**vars(plain), "dy": plain.dy[None]})
        levelled.levels = torch.zeros(15, dtype=torch.int64)
        assert all(map(identical, levelled.run(impl, device), plain.run(impl, device)))
    rows = plain.dy.to(device), plain.w_dec.to(device), plain.indices.to(device)
    expected = gather_dot_op(*rows, None, None, impl=impl)
    zeros = levelled.levels.to(device)
    assert identical(gather_dot_op(rows[0][None], *rows[1:], None, zeros, impl=impl), expected)


def check_given_dots(dtype, impl, device="cpu", levels=0):
    """gather_dot's dots, given, do what those of the operator itself do."""
    fused = operands(23, 33, 17, 15, 4, dtype, levels=levels)
    rows = [t if t is None else t.to(device) for t in (fused.dy, fused.w_dec, fused.indices)]
    given = None if fused.levels is None else fused.levels.to(device)
    dots = gather_dot_op(*rows, None, given, impl=impl).cpu()
    apart = Operands(**{**vars(fused), "d_pre": dots.masked_fill(fused.values == 0, 0)})
    assert identical(apart.run(impl, device)[0], fused.run(impl, device)[0])
    exact = fused.plain(torch.float64)
    # eager rounds the dots to their dtype as gather_dot does
    eager = Operands(**vars(fused))
    eager.d_pre = fused.dv(dtype)
    for found, e, in_eager in zip(
        apart.run(impl, device)[1:], exact[1:], eager.plain(torch.float32)[1:], strict=True
    ):
        assert_accurate(found, e, in_eager)


def check_dots_by_level(dtype, impl, device="cpu"):
    for n, d, f, k, count in ((0, 3, 5, 2, 2), (1, 1, 1, 1, 1), (13, 130, 20, 7, 4)):
        rows, w = randn(count, n, d, dtype=dtype), randn(f, d, dtype=dtype, seed=1)
        indices, levels = random_indices(n, k, f), torch.arange(f) * 3 % count
        given = [t.to(device) for t in (rows, w, indices, levels)]
        with unchanged(*given):
            out = gather_dot_op(*given[:3], None, given[3], impl=impl).cpu()
        taken = rows[levels[indices], torch.arange(n)[:, None]]
        exact, eager = ((taken.to(t) * w.to(t)[indices]).sum(-1) for t in (torch.float64, dtype))
        assert_accurate(out, exact, eager)
        turned = given[0].permute(1, 2, 0).contiguous().permute(2, 0, 1)
        again = gather_dot_op(turned, *given[1:3], None, given[3], impl=impl).cpu()
        assert identical(again, out)
