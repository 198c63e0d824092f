# SPDX-License-Identifier: Apache-2.0
"""Taking batches from a source, and refusing bad ones before they touch a weight."""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch

from mikernels._dispatch import accumulate_dtype
from mikernels.activations.sources import SourceExhausted
from mikernels.nn import SAE
from mikernels.values.batch import Batch, as_batch


class BatchSource(Protocol):
    """Where batches come from; `mikernels.activations` has four.

    One with a `batch_size` of None is asked for `next_batch(n)`.
    """

    d: int

    def next_batch(self) -> torch.Tensor | Batch:
        """`[batch, d]` floating, or a Batch of them; raises StopIteration or SourceExhausted when
        there is no more."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """The position, JSON-able."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def take_batches(
    source: BatchSource, count: int, first: int, sae: SAE, size: int
) -> list[Batch] | None:
    """The next `count` batches on the SAE's device, in float32 (float64 for a float64 SAE).

    Args:
        size: rows of a batch, for a source that leaves it open.
        first: number of the first of them in the run, from 1, for messages.

    Returns:
        The batches, or None when the source ended before the last of them.

    Raises:
        TypeError, ValueError: for a batch that is not a finite floating `[batch, d]`, by number,
            and for a source that ends within the first step.
    """
    batches = []
    asked = (size,) if getattr(source, "batch_size", size) is None else ()
    for number in range(first, first + count):
        try:
            batch = as_batch(source.next_batch(*asked))
        except (StopIteration, SourceExhausted) as error:
            if first == 1:
                raise ValueError(
                    f"Trainer: the source must give at least the {count} batches of one step, got "
                    f"{number - 1}; give more data or lower batch_size or accumulation"
                ) from error
            return None
        _check(batch.input, number, sae.config.d)
        if batch.target is not None:
            _check(batch.target, number, sae.config.d_out, "the target of ")
        elif sae.needs_target:
            raise ValueError(
                f"Trainer: batch {number} must be a Batch with a target [batch, "
                f"{sae.config.d_out}] for a {sae.name}, got none; make the source with one"
            )
        if batch.weights is not None:
            _check_weights(batch.weights, number, len(batch))
        batches.append(batch.to(sae.w_enc.device, accumulate_dtype(sae.w_enc.dtype)))
    return batches


def shares(batches: list[Batch]) -> list[float | torch.Tensor]:
    """Each batch's share of the tokens of them all, by weight; 0-dim where there are weights."""
    counts = [batch.count for batch in batches]
    total = sum(counts[1:], start=counts[0])
    if isinstance(total, torch.Tensor):
        total = total.clamp_min(torch.finfo(total.dtype).tiny)  # weights may all be 0
    return [count / total for count in counts]


def power_of_two_scale(batches: list[Batch]) -> float:
    """The power of two that brings the mean norm of the inputs' rows nearest to sqrt(d).

    1 for rows that are all zero or not finite. Synchronises a GPU.

    Raises:
        ValueError: it is not within 2^-64 to 2^64, beyond which biases could leave fp32's range.
    """
    inputs = [batch.input for batch in batches]
    # in fp64, for the squares may leave fp32's range
    norms = torch.cat([torch.linalg.vector_norm(x, dim=-1, dtype=torch.float64) for x in inputs])
    mean = float(norms.mean())
    if not (math.isfinite(mean) and mean > 0):
        return 1.0
    exponent = round(math.log2(inputs[0].shape[1] ** 0.5 / mean))
    if abs(exponent) > 64:
        raise ValueError(
            f"Trainer: the activations' mean norm must be within a factor of 2^64 of sqrt(d), got "
            f"{mean:.1e}; multiply them by 2^{exponent} in the source"
        )
    return 2.0**exponent


def _check_weights(weights: torch.Tensor, number: int, n: int) -> None:
    good = isinstance(weights, torch.Tensor) and weights.is_floating_point()
    if not good or weights.shape != (n,):
        got = list(weights.shape) if good else getattr(weights, "dtype", type(weights).__name__)
        raise ValueError(
            f"Trainer: the weights of batch {number} must be floating [{n}], got {got}"
        )
    # not at least 0, rather than below: NaN is refused
    if weights.device.type == "cpu" and not bool((weights >= 0).all() & weights.isfinite().all()):
        raise ValueError(
            f"Trainer: the weights of batch {number} must be finite and at least 0, got "
            f"{float(weights.min())} to {float(weights.max())}"
        )


def _check(x: torch.Tensor, number: int, d: int, what: str = "") -> None:
    if not isinstance(x, torch.Tensor) or not x.is_floating_point():
        got = x.dtype if isinstance(x, torch.Tensor) else type(x).__name__
        raise TypeError(f"Trainer: {what}batch {number} must be a floating tensor, got {got}")
    if x.dim() != 2 or x.shape[0] == 0 or x.shape[1] != d:
        raise ValueError(
            f"Trainer: {what}batch {number} must be [batch, {d}] with at least one row, got "
            f"{list(x.shape)}"
        )
    # a finite sum proves it in one read without a temporary. A batch on a GPU is not read back:
    # there the loss tells, at the next logged step
    if x.device.type == "cpu" and not x.sum().isfinite() and not (finite := x.isfinite()).all():
        rows = (~finite).any(-1).nonzero().squeeze(-1)
        raise ValueError(
            f"Trainer: {what}batch {number} must be finite, got NaN or inf in {rows.numel()} of "
            f"{x.shape[0]} rows (first: row {rows[0].item()}); drop those rows in the source"
        )
