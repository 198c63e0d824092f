# SPDX-License-Identifier: Apache-2.0
"""bf16 in Triton's interpreter as on a GPU, or an error.

The interpreter keeps a bf16 number as its 16 bits in a uint16, which is right for what moves bits
and silently wrong for the rest: casts from fp32 truncate (a NaN can become infinite), casts to
other types and all arithmetic take the bits for an integer. Here casts round to nearest, ties to
even, and products of matrices are those of the numbers; other arithmetic raises, because kernels
compute in fp32.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from interpreter_patches import Method, replace
from triton._C.libtriton import ir
from triton.runtime import interpreter

TensorHandle = interpreter.TensorHandle


def widen(bits: np.ndarray) -> np.ndarray:
    """fp32 of bf16 bits; exact."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def rounded(numbers: np.ndarray) -> np.ndarray:
    """bf16 bits of fp32 numbers: to nearest, ties to even; a NaN is the quiet one of torch."""
    bits = np.ascontiguousarray(numbers, np.float32).view(np.uint32)
    # a carry into the exponent is what rounding up there means, to infinity too; a NaN has no such
    nearest = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    return np.where(np.isnan(numbers), np.uint16(0x7FC0), nearest.reshape(numbers.shape))


def is_bf16(handle: Any) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _cast(old: Method) -> Method:
    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        to = dst_type.scalar
        if is_bf16(src) and to != tl.bfloat16:
            return old(self, TensorHandle(widen(src.data), tl.float32), dst_type)
        if to == tl.bfloat16 and not is_bf16(src):
            numbers = src.data.astype(np.float32)
            if not np.array_equal(numbers.astype(src.data.dtype), src.data, equal_nan=True):
                raise NotImplementedError(f"{src.dtype} to bf16 rounds twice: cast to fp32 first")
            return TensorHandle(rounded(numbers), tl.bfloat16)
        return old(self, src, dst_type)

    return cast_impl


def _dot(old: Method) -> Method:
    def create_dot(self: Any, a: Any, b: Any, d: Any, *more: Any) -> Any:
        if is_bf16(d):
            raise NotImplementedError("a product that accumulates in bf16")
        # products of two bf16 numbers are exact in fp32, as in a tensor core
        a, b = (TensorHandle(widen(t.data), tl.float32) if is_bf16(t) else t for t in (a, b))
        return old(self, a, b, d, *more)

    return create_dot


def _refusing(old: Method) -> Method:
    """Of a method that computes with the data of handles: with bf16's it would with their bits."""

    def compute(self: Any, *operands: Any) -> Any:
        handles = (o for o in operands if isinstance(o, TensorHandle))
        # a selection moves bits
        if any(map(is_bf16, handles)) and operands[-1] is not np.where:
            raise NotImplementedError("arithmetic in bf16: a kernel upcasts what it loads")
        return old(self, *operands)

    return compute


def _explicit_cast(old: Method) -> Method:
    def create_fp_to_fp(self: Any, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
        if tl.bfloat16 not in (src.dtype.scalar, dst_type.scalar):
            return old(self, src, dst_type, rounding_mode)
        if rounding_mode != ir.ROUNDING_MODE.RTNE:
            raise NotImplementedError(f"a cast of bf16 that rounds by {rounding_mode}")
        return self.cast_impl(src, dst_type)

    return create_fp_to_fp


def _refusing_reductions(old: Method) -> Method:
    def check_tensor(self: Any, input: Any) -> Any:
        if any(t.dtype.scalar == tl.bfloat16 for t in input):
            raise NotImplementedError("a reduction in bf16: a kernel upcasts what it loads")
        return old(self, input)

    return check_tensor


def install() -> None:
    builder = interpreter.InterpreterBuilder
    assert interpreter._get_np_dtype(tl.bfloat16) == np.uint16, "bf16 is not kept as its bits"
    replace(builder, "cast_impl", "src dst_type", _cast)
    replace(builder, "create_dot", "a b d input_precision max_num_imprecise_acc", _dot)
    for name, parameters in (
        ("unary_op", "arg op"),
        ("binary_op", "lhs rhs op"),
        ("ternary_op", "lhs rhs other op"),
        ("create_fma", "x y z"),
    ):
        replace(builder, name, parameters, _refusing)
    replace(builder, "create_fp_to_fp", "src dst_type rounding_mode", _explicit_cast)
    replace(interpreter.ReduceScanOpInterface, "check_tensor", "input", _refusing_reductions)
