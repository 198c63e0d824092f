# SPDX-License-Identifier: Apache-2.0
"""The point with the least sum of distances: a centre that a few huge activations cannot move.

Weiszfeld's iteration `m <- sum(x_i / r_i) / sum(1 / r_i)`, r_i = |x_i - m|, with the correction of
Vardi and Zhang (2000) where m meets data points, which the plain iteration cannot leave: with T the
weighted mean of the other points, R their pull sum((x_i - m) / r_i) and c the points met,

    m <- (1 - g) T + g m,   g = min(1, c / |R|)

The sum of distances never rises. All in fp64; O(n d) an iteration, one fp64 copy of x.
"""

from __future__ import annotations

import torch

MAX_ITERATIONS = 200
# relative to the mean distance from the centre; the sum of distances is flat there to its square
TOLERANCE = 1e-6


@torch.no_grad()
def geometric_median(x: torch.Tensor) -> torch.Tensor:
    """`argmin_m sum_i |x_i - m|`.

    Args:
        x: `[n, d]` floating, n at least 1, finite.

    Returns:
        `[d]` float64. Where many points are optimal (an even number on a line), one of them.

    Raises:
        ValueError: for another shape, no rows, or values that are not finite.
    """
    if x.dim() != 2 or x.shape[0] == 0:
        raise ValueError(
            f"geometric_median: x must be [n, d] with at least one row, got {list(x.shape)}"
        )
    points = x.double()
    median = points.mean(0)
    if not bool(median.isfinite().all()):
        raise ValueError("geometric_median: x must be finite, got NaN or inf; drop those rows")
    for _ in range(MAX_ITERATIONS):
        # by differences, not by |x|^2 - 2 x m + |m|^2, which cancels; no [n, d] temporary
        distances = torch.cdist(
            points, median[None], compute_mode="donot_use_mm_for_euclid_dist"
        ).squeeze(-1)
        scale = distances.mean()
        met = distances <= 1e-12 * scale
        if met.all():
            break
        weights = torch.where(met, 0, 1 / distances)
        target = weights @ points / weights.sum()
        pull = torch.linalg.vector_norm(weights.sum() * (target - median))
        stay = met.sum() / pull
        move = (1 - stay.clamp(max=1)) * (target - median) if met.any() else target - median
        median = median + move
        if torch.linalg.vector_norm(move) <= TOLERANCE * scale:
            break
    if not bool((median.sum() + scale).isfinite()):
        raise ValueError("geometric_median: x must have squares that are finite; scale it down")
    return median
