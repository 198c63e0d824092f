# SPDX-License-Identifier: Apache-2.0
"""What memory an operator may write: whether tensors overlap themselves or each other.

A kernel that adds to an expanded tensor adds every sum to one address, and one that writes over an
operand reads what it has written. Tensors are compared by address, sizes and strides, on the host:
3 us for an operator of five operands, and no device is waited for. By address rather than by
storage, for one NumPy array or DLPack capsule gives each tensor made of it a storage of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch._subclasses.fake_tensor import FakeTensor


def overlaps_itself(t: torch.Tensor) -> bool:
    """Whether two entries of `t` may share an address (true of every expanded tensor)."""
    if t.is_contiguous() or t.numel() == 0:
        return False
    reach = 0
    # in order of strides each dimension has to step over all that the ones before it reach
    for stride, size in sorted(zip(t.stride(), t.shape, strict=True)):
        if size > 1 and stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def _extent(dims: Sequence[tuple[int, int]], itemsize: int) -> int:
    return sum(stride * (size - 1) for stride, size in dims) + itemsize


_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor


def _address(t: torch.Tensor) -> int:
    """Where `t` begins; 0 for one that is empty, or has no memory yet."""
    # torch.compile's, vmap's, or a meta tensor, whose address is its offset alone
    if type(t) is FakeTensor or _is_wrapped(t) or t.is_meta:
        return 0
    return t.data_ptr()


def overlap(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether `a` and `b` may share an address; columns side by side in one buffer do not."""
    first, last = _address(a), _address(b)
    if last < first:
        a, b, first, last = b, a, last, first
    # contiguous tensors, the most of them, are told apart by their ends
    if not first or (a.is_contiguous() and last >= first + a.nbytes):
        return False
    sides = []
    for t in (a, b):
        item = t.element_size()
        dims = [(s * item, n) for s, n in zip(t.stride(), t.shape, strict=True) if s and n > 1]
        sides.append((_address(t) - first, sorted(dims), item))
    # bytes of both within one period of the largest stride, again and again
    while True:
        (start_a, dims_a, item_a), (start_b, dims_b, item_b) = sides
        end_a, end_b = start_a + _extent(dims_a, item_a), start_b + _extent(dims_b, item_b)
        if end_a <= start_b or end_b <= start_a:
            return False
        period = max((dims[-1][0] for dims in (dims_a, dims_b) if dims), default=0)
        if period == 0:
            return True
        for side, (start, dims, item) in enumerate(sides):
            inner = [d for d in dims if d[0] != period]
            sides[side] = (start % period, inner, item)
            if start % period + _extent(inner, item) > period:
                return True


def check_writes(op: str, names: Sequence[str], args: Sequence, written: Sequence[int]) -> None:
    """Written tensors overlap neither themselves nor another argument; others may be None."""
    for i in written:
        out = args[i]
        if out is None:
            continue
        if overlaps_itself(out):
            raise ValueError(
                f"{op}: {names[i]} must have a place in memory for every entry, got shape "
                f"{list(out.shape)} with strides {list(out.stride())}; pass "
                f"{names[i]}.contiguous()"
            )
        for j, other in enumerate(args):
            if j != i and isinstance(other, torch.Tensor) and overlap(out, other):
                raise ValueError(
                    f"{op}: {names[i]} must share no memory with {names[j]}, which it would "
                    f"change, got overlapping tensors; pass {names[j]}.clone()"
                )
