# SPDX-License-Identifier: Apache-2.0
"""Device code of encode: the screen again for uncertain tokens, which are few and lie anywhere.

Their k-th score is known from below by now, so no list is needed: a bit per feature tells whether
its bound reaches it, and `encode_exact` scores those. The host does not know how many such tokens
there are. It launches a grid for as many as there are bits for, and programs beyond them end.
"""

import triton.language as tl

from ..common.launch import kernel
from ..common.offline import Case
from ..common.products import multiply
from .encode_screen import SLACK

# 48 KB of shared memory: every target has it twice or, on CDNA, once
AGAIN = {"BLOCK_N": 128, "BLOCK_F": 128, "BLOCK_D": 32}
AGAIN_LAUNCH = {"num_warps": 8, "num_stages": 3}


@kernel(do_not_specialize=["f", "base", "capacity"])
def _encode_again_kernel(
    x_ptr, v_ptr, count_ptr, queue_ptr, thresholds_ptr, masks_ptr, f, base, capacity, width,
    stride_masks,
    BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Bits base.. of the masks, for packed tokens x and a panel v of f packed features."""
    tiles_n = tl.cdiv(capacity, BLOCK_N)
    # neighbours share a tile of weights
    tile_n = tl.program_id(0) % tiles_n
    tile_f = tl.program_id(0) // tiles_n
    count = tl.minimum(tl.load(count_ptr), capacity)
    if tile_n * BLOCK_N < count:
        number = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        token = tl.load(queue_ptr + number, mask=number < count, other=0)
        feature = tile_f * BLOCK_F + tl.arange(0, BLOCK_F)
        x = x_ptr + token.to(tl.int64)[:, None] * width
        v = v_ptr + tl.minimum(feature, f - 1).to(tl.int64)[None, :] * width
        total = tl.zeros([BLOCK_N, BLOCK_F], tl.float32)
        for first in range(0, width, BLOCK_D):
            column = first + tl.arange(0, BLOCK_D)
            inside = column < width
            left = tl.load(x + column[None, :], mask=inside[None, :], other=0.0)
            right = tl.load(v + column[:, None], mask=inside[:, None], other=0.0)
            total = multiply(left, right, total, WIDEN)
        threshold = tl.load(thresholds_ptr + token)
        # NaN reaches
        below = total + tl.abs(total) * 2.0**-20 + SLACK < threshold[:, None]
        reaches = (below == 0) & (feature < f)[None, :]
        bits = reaches.to(tl.int32) << (tl.arange(0, BLOCK_F) % 32)[None, :]
        words = tl.sum(tl.reshape(bits, [BLOCK_N, BLOCK_F // 32, 32]), 2)
        word = tile_f * (BLOCK_F // 32) + tl.arange(0, BLOCK_F // 32)
        address = masks_ptr + number.to(tl.int64)[:, None] * stride_masks + base // 32
        inside = (number < count)[:, None] & (word * 32 < f)[None, :]
        tl.store(address + word[None, :], words, mask=inside)


def cases() -> list[Case]:
    pointers = {"x_ptr": "*fp16", "v_ptr": "*fp16", "count_ptr": "*i32", "queue_ptr": "*i32"}
    pointers |= {"thresholds_ptr": "*fp32", "masks_ptr": "*i32"}
    sizes = dict.fromkeys(("f", "base", "capacity", "width", "stride_masks"), "i32")
    return [
        Case(
            "again",
            _encode_again_kernel,
            pointers | sizes,
            AGAIN | {"WIDEN": False},
            **AGAIN_LAUNCH,
            matrix=True,
            divisible=("width",),
        )
    ]
