# SPDX-License-Identifier: Apache-2.0
"""Device code of encode: the tokens whose screened selection is not certain, without the screen."""

import triton.language as tl

from ..common.launch import kernel
from ..common.offline import Case, with_odd_sizes
from ..select.row_topk_passes import select_by_passes
from .encode_screen import exact_scores, relu_of

EXACT = {"FEATURES": 32, "BLOCK": 128, "PASS": 2048}
EXACT_WARPS = 8


@kernel(do_not_specialize=["n", "f", "k"])
def _encode_exact_kernel(
    x_ptr, w_ptr, b_enc_ptr, b_dec_ptr, scale_ptr, certain_ptr, scratch_ptr,
    values_ptr, indices_ptr, n, d, f, k,
    stride_xn, stride_xd, stride_wf, stride_wd, stride_be, stride_bd, stride_s,
    RELU: tl.constexpr, FEATURES: tl.constexpr, BLOCK: tl.constexpr, PASS: tl.constexpr,
):  # fmt: skip
    """All scores of an uncertain token in fp64, and its k best; one program per token.

    The host does not know how many tokens are uncertain (usually none), so a fixed number of
    programs share all tokens, and a program's scratch [2, f] serves one after the other.
    """
    ranks = scratch_ptr + tl.program_id(0).to(tl.int64) * 2 * f
    scores = ranks + f
    programs = tl.num_programs(0).to(tl.int64)
    for turn in range(tl.cdiv(n - tl.program_id(0), tl.num_programs(0))):
        row = tl.program_id(0) + turn * programs
        if tl.load(certain_ptr + row) == 0:
            for first in range(0, f, FEATURES):
                feature = first + tl.arange(0, FEATURES)
                inside = feature < f
                h, s = exact_scores(
                    x_ptr + row * stride_xn, w_ptr, b_enc_ptr, b_dec_ptr, scale_ptr,
                    tl.where(inside, feature, 0).to(tl.int64), d,
                    stride_xd, stride_wf, stride_wd, stride_be, stride_bd, stride_s, BLOCK,
                )  # fmt: skip
                tl.store(ranks + feature, s, mask=inside)
                tl.store(scores + feature, h, mask=inside)
            tl.debug_barrier()
            values = values_ptr + row * k
            indices = indices_ptr + row * k
            select_by_passes(ranks, values, indices, f, k, 0, 0, PASS)
            tl.debug_barrier()
            # ranking scores were stored as values; h takes their place
            for first in range(0, k, PASS):
                slot = first + tl.arange(0, PASS)
                feature = tl.load(indices + slot, mask=slot < k, other=0)
                h = tl.load(scores + feature, mask=slot < k, other=0.0)
                if RELU:
                    h = relu_of(h)
                tl.store(values + slot, h, mask=slot < k)
            tl.debug_barrier()


def cases() -> list[Case]:
    found = []
    for name in ("fp32", "bf16", "fp16"):
        operands = dict.fromkeys(("x_ptr", "w_ptr", "b_enc_ptr", "b_dec_ptr"), f"*{name}")
        ones = dict.fromkeys(("stride_xd", "stride_wd", "stride_be", "stride_bd", "stride_s"), 1)
        found.append(
            Case(
                f"exact {name}",
                _encode_exact_kernel,
                operands
                | {"certain_ptr": "*i32", "scratch_ptr": "*fp32", "values_ptr": f"*{name}"}
                | {"indices_ptr": "*i64", "stride_xn": "i32", "stride_wf": "i32"}
                | dict.fromkeys(("n", "d", "f", "k"), "i32"),
                ones | {"scale_ptr": None, "RELU": True} | EXACT,
                num_warps=EXACT_WARPS,
                divisible=("stride_xn", "stride_wf", "d"),
            )
        )
    return with_odd_sizes(found)
