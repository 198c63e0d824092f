# SPDX-License-Identifier: Apache-2.0
"""Which activations of a model are no data for an SAE, and why."""

from __future__ import annotations

import torch

from mikernels._dispatch import accumulate_dtype

REASONS = ("skipped", "special", "nonfinite", "outlier")


def dropped(
    tokens: torch.Tensor,
    activations: torch.Tensor,
    skip_first: int,
    special: torch.Tensor,
    outlier_norm: float | None,
) -> dict[str, torch.Tensor]:
    """For each of REASONS, `[w, t]` bool on the CPU: the tokens that it applies to.

    Args:
        tokens: `[w, t]` ids of windows, on the CPU. activations: `[w, t, d]`.
        skip_first: positions skipped at the start of each window.
        special: ids of special tokens.
        outlier_norm: a norm of more than this many times the median of its window is an outlier;
            None: none is.
    """
    drop = {name: torch.zeros(tokens.shape, dtype=torch.bool) for name in REASONS}
    drop["skipped"][:, :skip_first] = True
    drop["special"] = torch.isin(tokens, special)
    finite = activations.isfinite().all(-1).cpu()
    drop["nonfinite"] = ~finite
    if outlier_norm is not None:
        acc = accumulate_dtype(activations.dtype)
        norms = activations.norm(dim=-1, dtype=acc).cpu()
        median = norms.where(finite, torch.nan).nanmedian(-1, keepdim=True).values
        drop["outlier"] = finite & ~(norms <= outlier_norm * median)
    return drop
