# SPDX-License-Identifier: Apache-2.0
"""What the judges ask of a sparse autoencoder, and SAEs of other libraries in that form."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from mikernels.nn import SAE
from mikernels.values.batch import Batch
from mikernels.values.codes import SparseCodes

# tokens whose dense activations [rows, F] are in memory at once
DENSE_ROWS = 512


class Judged(Protocol):
    """A sparse autoencoder, or a transcoder, in use: `mikernels.nn.SAE` is one as it stands."""

    def encode(self, x: torch.Tensor) -> SparseCodes:
        """The codes of x `[n, d]`."""
        ...

    def decode(self, codes: SparseCodes) -> torch.Tensor:
        """`[n, d]` reconstructions."""
        ...


class DenseSAE:
    """An SAE whose `encode` returns all F activations of a token, given and taken as codes.

    Its codes are its activations that are not 0, and `decode` gives it back what it returned, so
    nothing of it is assumed: neither its architecture, nor names of weights.

    Args:
        sae: `encode(x [n, d])` returns `[n, F]` (or SparseCodes, which are passed on), and
            `decode` takes that to `[n, d]`. Both may keep state between them, as SAELens does with
            the norms of the last input: the judges decode what they encoded last. A module runs in
            eval mode, and is left in the mode it was in.
    """

    def __init__(self, sae: Any):
        self.sae = sae
        self._by_codes = False

    @contextmanager
    def _in_use(self) -> Iterator[None]:
        modules = self.sae.modules() if isinstance(self.sae, torch.nn.Module) else ()
        training = [module for module in modules if module.training]
        for module in training:
            module.training = False
        try:
            with torch.no_grad():
                yield
        finally:
            for module in training:
                module.training = True

    def encode(self, x: torch.Tensor) -> SparseCodes:
        """The codes of x `[n, d]`, ragged; `[n, F]` is in memory."""
        with self._in_use():
            acts = self.sae.encode(x)
        self._by_codes = isinstance(acts, SparseCodes)
        if isinstance(acts, SparseCodes):
            return acts
        if not isinstance(acts, torch.Tensor) or acts.shape[:1] != x.shape[:1] or acts.dim() != 2:
            got = list(acts.shape) if isinstance(acts, torch.Tensor) else type(acts).__name__
            raise TypeError(
                f"as_judged: encode of {type(self.sae).__name__} must return activations "
                f"[{len(x)}, F] or SparseCodes for [{len(x)}, d], got {got}; wrap it"
            )
        acts = acts.to_dense() if acts.layout != torch.strided else acts
        tokens, features = acts.nonzero(as_tuple=True)
        offsets = features.new_zeros(len(x) + 1)
        offsets[1:] = torch.bincount(tokens, minlength=len(x)).cumsum(0)
        return SparseCodes._trusted(acts[tokens, features], features, acts.shape[1], offsets)

    def decode(self, codes: SparseCodes) -> torch.Tensor:
        with self._in_use():
            return self.sae.decode(codes if self._by_codes else codes.to_dense())


def as_judged(sae: Any) -> Judged:
    """An SAE as the judges take it: ours as it is, others through DenseSAE.

    Args:
        sae: of `mikernels.nn`; or any object with `encode` and `decode`, such as an SAE of SAELens
            or a dictionary of dictionary_learning.

    Raises:
        TypeError: for an object without them.
    """
    if isinstance(sae, SAE | DenseSAE):
        return sae
    missing = [name for name in ("encode", "decode") if not callable(getattr(sae, name, None))]
    if missing:
        raise TypeError(
            f"as_judged: sae must have encode and decode, got {type(sae).__name__} without "
            f"{' and '.join(missing)}; load it with mikernels.training.load_sae, SAELens or "
            f"dictionary_learning"
        )
    return DenseSAE(sae)


def _inner(sae: Judged) -> Any:
    return sae.sae if isinstance(sae, DenseSAE) else sae


def width_of(sae: Judged) -> int | None:
    """d, where the SAE says so: of our settings, SAELens' or dictionary_learning's; else None."""
    inner = _inner(sae)
    for owner, name in (
        (getattr(inner, "config", None), "d"),
        (getattr(inner, "cfg", None), "d_in"),
        (inner, "activation_dim"),
    ):
        width = getattr(owner, name, None)
        if isinstance(width, int):
            return width
    return None


def check_width(where: str, sae: Judged, d: int, what: str) -> None:
    """ValueError where the SAE is known to be of another width than `what`, which has d."""
    width = width_of(sae)
    if width is not None and width != d:
        raise ValueError(
            f"{where}: sae must be of width {d} like {what}, got one of width {width}; give the "
            f"SAE of this model and layer"
        )


def check_target(where: str, sae: Judged, given: bool) -> None:
    """ValueError for a transcoder that is to be compared with its own input."""
    if getattr(sae, "needs_target", False) and not given:
        name = getattr(sae, "name", type(sae).__name__)
        raise ValueError(
            f"{where}: a {name} must be compared with the target that it has learned, got none; "
            f"give measure_reconstruction Batch(input, target)"
        )


def _at_home(sae: Judged, x: torch.Tensor) -> torch.Tensor:
    """x on the device and in the dtype of the SAE's parameters, where it is a module with some."""
    inner = _inner(sae)
    if isinstance(inner, torch.nn.Module):
        first = next((p for p in inner.parameters() if p.is_floating_point()), None)
        if first is not None:
            # ours take any dtype, and compare with what they were given
            return x.to(first.device) if isinstance(inner, SAE) else x.to(first.device, first.dtype)
    return x


def reconstructed(
    where: str, sae: Judged, batch: Batch, rows: int
) -> Iterator[tuple[Batch, SparseCodes, torch.Tensor]]:
    """Parts of a batch in order, at most `rows` tokens each, with codes and reconstructions.

    Raises:
        ValueError: for reconstructions of another shape than the batch's target.
    """
    rows = min(rows, DENSE_ROWS) if isinstance(sae, DenseSAE) else rows
    for start in range(0, len(batch), rows):
        part = batch.map(lambda t: t[start : start + rows])  # noqa: B023  (called at once)
        codes = sae.encode(_at_home(sae, part.input))
        y = sae.decode(codes)
        if y.shape != part.output.shape:
            raise ValueError(
                f"{where}: the reconstructions of sae must be {list(part.output.shape)} like what "
                f"they are compared with, got {list(y.shape)}; give the target that it has learned"
            )
        yield part, codes, y
