# SPDX-License-Identifier: Apache-2.0
"""sae_update_: see mikernels/ops/sae/update.py.

A program owns R consecutive features. For each it sums both gradient rows in registers, as
`update_rows` does, and applies them there, so that weights and moments are read once and
written once and gradients never. Its part of sum_f db_enc[f] w_enc[f] is one row of a workspace of
at most 4096 rows. Rows wider than 4096 are left to `update_wide`.
"""

from __future__ import annotations

import torch
import triton.language as tl

from ..common.launch import ceil_div, kernel
from ..common.offline import Case
from . import gradients_hot
from .adam import _coefficients_kernel, halves, moved, next_moments, shrinkage
from .adam_sumsq import product_sum
from .update_rows import TILES, WIDEST, _update_shares_kernel, feature_rows, row_tile
from .update_wide import update_by_pieces

MOST_PROGRAMS = 4096  # 15 for each of 264 that run at once on an H200


@kernel(do_not_specialize=["n_features", "bits", "k", "R"])
def _sae_update_kernel(
    values, order, offsets, tokens, dy, x, w_dec, partial, partial_bias,
    w_enc, m_dec, v_dec, m_enc, v_enc, shadow_dec, shadow_enc, db_enc, row_sums,
    coefficients_ptr, clip_ptr, rest1, beta2, rest2, eps,
    n_features, R, bits, k, d, dy_n, dy_d, x_n, x_d,
    PROJECT: tl.constexpr, UNIT_NORM: tl.constexpr,
    SHADOW_DEC: tl.constexpr, SHADOW_ENC: tl.constexpr,
    SHORT: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # a 64-bit row and 32-bit columns: 64-bit columns would take 8 registers more a pointer
    columns = tl.arange(0, BLOCK_D)
    inside = columns < d
    clip = tl.load(clip_ptr).to(tl.float32)
    total = tl.zeros([BLOCK_D], tl.float32)
    first = tl.program_id(0).to(tl.int64) * R
    for feature in range(first, tl.minimum(first + R, n_features)):
        at = feature * d
        # rows come from memory early: these during the gathers, the encoder's during the update of
        # the decoder's; all six during the gathers would spill at 4096
        p = tl.load(w_dec + at + columns, inside, other=0).to(tl.float32)
        m1 = tl.load(m_dec + at + columns, inside, other=0)
        v1 = tl.load(v_dec + at + columns, inside, other=0)
        to_dec, to_enc, bias = feature_rows(
            feature, values, order, offsets, tokens, dy, x, p, partial, partial_bias,
            bits, k, d, dy_n, dy_d, x_n, x_d, columns, inside, SHORT, E, BLOCK_D,
        )  # fmt: skip
        tl.store(db_enc + feature, bias)
        q = tl.load(w_enc + at + columns, inside, other=0).to(tl.float32)
        m2 = tl.load(m_enc + at + columns, inside, other=0)
        v2 = tl.load(v_enc + at + columns, inside, other=0)
        if PROJECT:
            to_dec -= product_sum(to_dec, p).to(tl.float32) * p
        m1, v1 = next_moments(to_dec * clip, m1, v1, rest1, beta2, rest2)
        tl.store(m_dec + at + columns, m1, inside)
        tl.store(v_dec + at + columns, v1, inside)
        p = moved(p, m1, v1, coefficients_ptr, eps)
        if UNIT_NORM:
            # beyond the row 0 / eps, which is NaN for eps = 0
            rest = tl.where(inside, p, 0.0)
            p *= shrinkage(product_sum(rest, rest)).to(tl.float32)
        rounded = p.to(w_dec.dtype.element_ty)
        tl.store(w_dec + at + columns, rounded, inside)
        if SHADOW_DEC:
            tl.store(shadow_dec + at + columns, rounded.to(shadow_dec.dtype.element_ty), inside)
        total += bias * q
        m2, v2 = next_moments(to_enc * clip, m2, v2, rest1, beta2, rest2)
        tl.store(m_enc + at + columns, m2, inside)
        tl.store(v_enc + at + columns, v2, inside)
        rounded = moved(q, m2, v2, coefficients_ptr, eps).to(w_enc.dtype.element_ty)
        tl.store(w_enc + at + columns, rounded, inside)
        if SHADOW_ENC:
            tl.store(shadow_enc + at + columns, rounded.to(shadow_enc.dtype.element_ty), inside)
    tl.store(row_sums + tl.program_id(0).to(tl.int64) * d + columns, total, inside)


def check_rows(w_dec: torch.Tensor, **tensors: torch.Tensor | None) -> None:
    """What the kernel reads and writes by row number is there, one row after another."""
    for name, t in {"w_dec": w_dec, **tensors}.items():
        moment = name[0] in "mv"
        if t is None:
            continue
        if (
            t.shape != w_dec.shape
            or not t.is_contiguous()
            or t.dtype == torch.float64
            or (moment and t.dtype != torch.float32)
        ):
            raise RuntimeError(
                f"sae_update_: {name} must be contiguous {list(w_dec.shape)}"
                f"{' float32' if moment else ', not float64'}, got {list(t.shape)} with strides "
                f"{list(t.stride())} and {t.dtype}"
            )


def sae_update_(
    values: torch.Tensor,
    indices: torch.Tensor,
    offsets: torch.Tensor,
    order: torch.Tensor,
    tokens: torch.Tensor | None,
    dy: torch.Tensor,
    x: torch.Tensor,
    w_dec: torch.Tensor,
    w_enc: torch.Tensor,
    m_dec: torch.Tensor,
    v_dec: torch.Tensor,
    m_enc: torch.Tensor,
    v_enc: torch.Tensor,
    shadow_dec: torch.Tensor | None,
    shadow_enc: torch.Tensor | None,
    lr: torch.Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    step: torch.Tensor,
    clip: torch.Tensor,
    project: bool,
    unit_norm: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    rows = {"w_enc": w_enc, "m_dec": m_dec, "v_dec": v_dec, "m_enc": m_enc, "v_enc": v_enc}
    shadows = {"shadow_dec": shadow_dec, "shadow_enc": shadow_enc}
    check_rows(w_dec, **rows, **shadows)
    n_features, d = w_dec.shape
    if n_features == 0:
        return w_dec.new_empty(0, dtype=torch.float32), w_dec.new_zeros(d, dtype=torch.float32)
    settings = lr, beta1, beta2, eps, step, clip
    slots = gradients_hot.held(values, offsets, order, tokens, dy.shape[0])
    values = values.contiguous()
    db_enc = w_dec.new_empty(n_features, dtype=torch.float32)
    # at odd widths every element has its own address, and ten rows of 4096 spill
    if d > (WIDEST if d % 16 == 0 else WIDEST // 2):
        weights = tuple(rows.values())
        d_input = update_by_pieces(
            values, slots, dy, x, w_dec, weights, db_enc, settings, project, unit_norm
        )
        for shadow, weight in ((shadow_dec, w_dec), (shadow_enc, w_enc)):
            if shadow is not None:
                shadow.copy_(weight)
        return db_enc, d_input
    partial = dy.new_empty(slots.shares, 2, d, dtype=torch.float32)
    partial_bias = dy.new_empty(slots.shares, dtype=torch.float32)
    operands = (
        values, slots.order, slots.offsets, slots.tokens, dy, x, w_dec, partial, partial_bias
    )  # fmt: skip
    sizes = slots.k, d, *dy.stride(), *x.stride()
    tile = row_tile(d, slots.count)
    if slots.shares:
        _update_shares_kernel[(slots.shares,)](
            *operands, n_features, slots.count, slots.bits, *sizes, **tile
        )
    owned = ceil_div(n_features, MOST_PROGRAMS)
    programs = ceil_div(n_features, owned)
    row_sums = dy.new_empty(programs, d, dtype=torch.float32)
    coefficients = dy.new_empty(2, dtype=torch.float32)
    _coefficients_kernel[(1,)](lr, step, coefficients, *halves(beta1), *halves(beta2), num_warps=1)
    _sae_update_kernel[(programs,)](
        *operands, *rows.values(),
        w_dec if shadow_dec is None else shadow_dec, w_enc if shadow_enc is None else shadow_enc,
        db_enc, row_sums, coefficients, clip, 1 - beta1, beta2, 1 - beta2, eps,
        n_features, owned, slots.bits, *sizes,
        PROJECT=project, UNIT_NORM=unit_norm,
        SHADOW_DEC=shadow_dec is not None, SHADOW_ENC=shadow_enc is not None, **tile,
    )  # fmt: skip
    return db_enc, row_sums.sum(0, dtype=torch.float64).float()


def cases() -> list[Case]:
    found = []
    fixed = dict.fromkeys(("offsets", "order"), "*i64") | {"clip_ptr": "*fp64"}
    names = "partial", "partial_bias", "m_dec", "v_dec", "m_enc", "v_enc", "db_enc", "row_sums"
    fixed |= dict.fromkeys((*names, "coefficients_ptr"), "*fp32")
    fixed |= dict.fromkeys(("rest1", "beta2", "rest2", "eps"), "fp32")
    fixed |= dict.fromkeys(("n_features", "R", "bits", "k", "d", "dy_n", "x_n"), "i32")
    fixed |= dict.fromkeys(("shadow_dec", "shadow_enc"), "*bf16")
    flags = dict.fromkeys(("PROJECT", "UNIT_NORM", "SHADOW_DEC", "SHADOW_ENC"), True)
    for dtype, weights in [("fp32", "fp32"), ("bf16", "fp32"), ("fp32", "bf16"), ("fp16", "fp16")]:
        types = dict.fromkeys(("values", "dy", "x"), f"*{dtype}")
        types |= dict.fromkeys(("w_dec", "w_enc"), f"*{weights}") | fixed
        for block_d, (entries, warps) in TILES.items():
            if (dtype, weights) != ("fp32", "fp32") and block_d < WIDEST:
                continue
            tile = flags | dict(dy_d=1, x_d=1, SHORT=True, E=entries, BLOCK_D=block_d)
            even = "d", "dy_n", "x_n"
            for kind, typed, constants in gradients_hot.FORMS:
                found.append(
                    Case(
                        f"{dtype} w={weights} BLOCK_D={block_d}{kind}",
                        _sae_update_kernel,
                        types | typed,
                        tile | constants,
                        warps,
                        divisible=even,
                    )
                )
    return found
