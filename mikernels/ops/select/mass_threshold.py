# SPDX-License-Identifier: Apache-2.0
"""The threshold that keeps a fraction of the mass: pruning without sorting.

`t = max { v in x : sum of the x >= v is at least frac * sum of x }`: the entries at or above t hold
the fraction, and no higher threshold does. Sorting finds it too, with a sorted copy, 64-bit indices
and a running sum that fp32 rounds; here the CPU kernel reads x twice and sums exactly: the values
that share their upper 16 bits share an exponent, so their masses add up as integers. O(n) time,
half a MB of scratch a thread and 1 MB, the same bits for any number of threads. The CUDA kernels
read x three times (twice in 16 bits), with 50 KB of scratch, and nothing waits for them: where x
holds what it must not, the threshold is NaN.
"""

from __future__ import annotations

import math

import torch

from mikernels._autocast import in_own_dtype
from mikernels._dispatch import Op, check_floating


def reference(x: torch.Tensor, frac: float, absolute: bool) -> torch.Tensor:
    flat = (x.abs() if absolute else x).reshape(-1)
    outside = ~(flat.isfinite() & (flat >= 0)).all()
    ordered = flat.sort(descending=True).values
    mass = ordered.double().cumsum(0)
    target = mass[-1:] * frac if frac else mass.new_zeros(1)
    first = torch.searchsorted(mass, target).clamp(max=len(flat) - 1)
    # by gather: an index that is a tensor would be read from the device
    return ordered.gather(0, first)[0].masked_fill(outside, math.nan)


mass_threshold_op = Op(
    "mass_threshold(Tensor x, float frac, bool absolute) -> Tensor",
    reference,
    lambda x, frac, absolute: x.new_empty(()),
    operands={"x": "T[...]"},
    cuda=True,
)


@in_own_dtype
def mass_threshold(
    x: torch.Tensor, frac: float, *, abs: bool = False, impl: str | None = None
) -> torch.Tensor:
    """The largest threshold at which the entries `x >= t` hold a fraction of the total mass.

    circuit-tracer's `find_threshold`, which sorts: `mask = x >= mass_threshold(x, 0.8)`.

    Args:
        x: any shape and strides, not empty, finite, and not negative unless `abs`; float32,
            bfloat16, float16 or float64.
        frac: in 0..1.
        abs: of |x|.
        impl: None (best for the device), "cpp", "cuda" or "reference".

    Returns:
        The threshold, a scalar tensor in the dtype of x, one of its entries (of |x|). Sums are
        exact or fp64, whatever the dtype. Not differentiable. On a GPU, where nothing waits to be
        told, it is NaN if entries are not finite or, without `abs`, negative.

    Raises:
        TypeError, ValueError: for a dtype, a fraction or, on the CPU, entries other than the above.

    Example:
        >>> x = torch.tensor([5.0, 1.0, 3.0, 1.0])
        >>> x >= mk.mass_threshold(x, 0.8)  # 5 + 3 of 10
        tensor([ True, False,  True, False])
    """
    name = "mass_threshold"
    check_floating(name, x=x)
    if not 0 <= frac <= 1:
        raise ValueError(f"{name}: frac must be in 0..1, got {frac}")
    if x.numel() == 0:
        raise ValueError(f"{name}: x must have entries, got shape {list(x.shape)}")
    x = x.detach()
    if x.device.type != "cpu":
        return mass_threshold_op(x, float(frac), abs, impl=impl)
    low, high = (float(v) for v in x.aminmax())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"{name}: x must be finite, got {low} to {high}; remove the others first")
    if low < 0 and not abs:
        raise ValueError(
            f"{name}: x must not be negative, got {low}; pass abs=True for the mass of |x|"
        )
    return mass_threshold_op(x, float(frac), abs, impl=impl)
