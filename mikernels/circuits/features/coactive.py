# SPDX-License-Identifier: Apache-2.0
"""Features, or neurons, that are active together, and what they are active for together.

Of activations X `[N, F]`, with g = X^T X, c_ij the tokens on which both i and j are not 0, c_i
those of i, and m, s the means and standard deviations over tokens:

| measure | of a pair |
|---|---|
| "cosine" | `g_ij / sqrt(g_ii g_jj)` |
| "correlation" | `(g_ij / N - m_i m_j) / (s_i s_j)` |
| "product" | `g_ij` |
| "jaccard" | `c_ij / (c_i + c_j - c_ij)` |
| "pmi" | `log(N c_ij / (c_i c_j))`, pointwise mutual information |

Codes stay sparse, and g is made block by block of its rows: O(sum over tokens of active^2) time,
and memory for the codes and one block. A pair that is never active together is not ranked. Of
dense activations `pairwise_topk` finds the strongest pairs, without g.

Principal components are those of the centred X, whose covariance is `X^T X / N - m m^T`. They take
products with X alone (Lanczos: `scipy.sparse.linalg.eigsh`); no centred X is formed, which would be
dense, and no covariance.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.table import Table

from mikernels.circuits.features.dictionaries import slots_of
from mikernels.ops.pairs.pairwise_topk import pairwise_topk
from mikernels.values.codes import SparseCodes

NAME = "coactivation"
PRODUCTS = ("cosine", "correlation", "product")
COUNTS = ("jaccard", "pmi")
# products of two activations of a token in a block, which is the most numbers that it may hold
BLOCK = 1 << 24
# up to so many features a covariance is formed: Lanczos needs some more than components
SMALL = 64
Codes = SparseCodes | torch.Tensor
FORM = "SparseCodes, a floating tensor [tokens, neurons], or an iterable of either"


class Pair(NamedTuple):
    """Two features, the first with the smaller number.

    Attributes:
        first, second: their numbers. score: the measure. together: tokens on which both are active.
    """

    first: int
    second: int
    score: float
    together: int


class Components(NamedTuple):
    """Principal components of some features.

    Attributes:
        features: `[n]` int64, their numbers.
        directions: `[r, n]` float64, orthonormal rows, largest variance first; the largest entry of
            each is positive.
        variances: `[r]` float64, along them. total: of all n features.
    """

    features: torch.Tensor
    directions: torch.Tensor
    variances: torch.Tensor
    total: float

    @property
    def explained(self) -> torch.Tensor:
        """`[r]`: the share of the variance; 0 where there is none."""
        return self.variances / self.total if self.total else torch.zeros_like(self.variances)

    def group(self, component: int, k: int = 10) -> list[tuple[int, float]]:
        """The features with the k largest entries of one component, by size."""
        row = self.directions[component]
        best = row.abs().argsort(descending=True, stable=True)[:k]
        return [(int(self.features[i]), float(row[i])) for i in best]


@dataclass(frozen=True, eq=False)
class Coactivation:
    """Which features are active together. Prints as a table.

    Attributes:
        by: the measure. n_tokens: N. n_features: F.
        features: `[n]` int64 ascending: those that are ever active.
        counts: `[n]` int64: on how many tokens. means: `[n]` float64, over all tokens.
        pairs: the k strongest, largest measure first; ties by number.
        groups: the features of each connected component of these pairs, largest group first.
    """

    by: str
    n_tokens: int
    n_features: int
    features: torch.Tensor
    counts: torch.Tensor
    means: torch.Tensor
    pairs: tuple[Pair, ...]
    groups: tuple[tuple[int, ...], ...]
    # scipy's CSR, or an array: [N, n] float64
    _x: Any = field(repr=False)

    def components(self, r: int = 5, features: Sequence[int] | None = None) -> Components:
        """Principal components of the activations.

        Args:
            r: how many; fewer of fewer features.
            features: some, for example a group; None: all that are ever active.

        Raises:
            ValueError: another r; features that are never active.
        """
        if isinstance(r, bool) or not isinstance(r, int) or r < 1:
            raise ValueError(f"components: r must be at least 1, got {r!r}")
        given = self.features.tolist() if features is None else list(features)
        wanted = torch.tensor(given, dtype=torch.int64)
        active = torch.isin(wanted, self.features)
        if not len(wanted) or not active.all() or len(wanted.unique()) < len(wanted):
            got = wanted[active.int().argmin()].item() if len(wanted) else "none"
            raise ValueError(
                f"components: features must be different ones that are ever active, got {got}"
            )
        at = torch.searchsorted(self.features, wanted)
        x, means = self._x[:, at.numpy()], self.means[at].numpy()
        squares = x.multiply(x).sum(0) if hasattr(x, "multiply") else (x * x).sum(0)
        total = float(np.asarray(squares).sum() / self.n_tokens - (means**2).sum())
        values, vectors = _eigenvectors(x, means, self.n_tokens, min(r, len(wanted)))
        largest = abs(vectors).argmax(0)
        vectors *= np.where(vectors[largest, np.arange(vectors.shape[1])] < 0, -1.0, 1.0)
        return Components(
            wanted,
            torch.from_numpy(vectors.T.copy()),
            torch.from_numpy(np.maximum(values, 0)),
            max(total, 0.0),
        )

    def _cells(self) -> list[tuple[str, ...]]:
        head: tuple[str, ...] = ("first", "second", self.by, "together")
        return [head] + [
            (str(p.first), str(p.second), f"{p.score:.4f}", str(p.together)) for p in self.pairs
        ]

    def _title(self) -> str:
        return (
            f"{len(self.features):,} of {self.n_features:,} features are active on "
            f"{self.n_tokens:,} tokens"
        )

    def __str__(self) -> str:
        cells = self._cells()
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        rows = [
            "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
            for row in cells
        ]
        return "\n".join([self._title(), *rows])

    def __rich__(self) -> Table:
        head, *rows = self._cells()
        table = Table(title=self._title(), title_justify="left")
        for name in head:
            table.add_column(name, justify="right")
        for row in rows:
            table.add_row(*row)
        return table


def _eigenvectors(x: Any, means: np.ndarray, tokens: int, r: int) -> tuple[np.ndarray, np.ndarray]:
    """The r largest eigenvalues, descending, and eigenvectors `[n, r]` of the covariance."""
    n = len(means)

    def apply(v: np.ndarray) -> np.ndarray:
        v = v.reshape(n, -1)
        return x.T @ (x @ v) / tokens - means[:, None] * (means @ v)

    if n <= max(SMALL, r + 1):
        values, vectors = np.linalg.eigh(apply(np.eye(n)))
    else:
        # 0.1 s of imports that nothing else here needs
        from scipy.sparse.linalg import LinearOperator, eigsh

        covariance = LinearOperator((n, n), matvec=apply, matmat=apply, dtype=np.float64)
        # of no random numbers, and orthogonal to no component but by chance
        start = 1 + np.cos(np.arange(n, dtype=np.float64) ** 2)
        values, vectors = eigsh(covariance, k=r, which="LA", v0=start)
    order = np.argsort(-values, kind="stable")[:r]
    return values[order], np.ascontiguousarray(vectors[:, order])


def _parts(codes: Codes | Iterable[Codes]) -> Iterator[Codes]:
    given = [codes] if isinstance(codes, SparseCodes | torch.Tensor) else codes
    if not isinstance(given, Iterable):
        raise TypeError(f"{NAME}: codes must be {FORM}, got {type(codes).__name__}")
    for part in given:
        dense = isinstance(part, torch.Tensor) and part.is_floating_point() and part.dim() == 2
        if dense or isinstance(part, SparseCodes):
            yield part.detach()
        else:
            got = type(part).__name__
            if isinstance(part, torch.Tensor):
                got = f"{part.dtype} {list(part.shape)}"
            raise TypeError(f"{NAME}: codes must be {FORM}, got {got}")


def _read(codes: Codes | Iterable[Codes]) -> tuple[Any, int]:
    """All of them, as CSR `[N, F]` or a tensor `[N, F]` in float64, and F."""
    from scipy.sparse import csr_array, vstack

    found, widths = [], set()
    for part in _parts(codes):
        widths.add(part.shape[-1])
        values = part.values if isinstance(part, SparseCodes) else part
        if not values.isfinite().all():
            raise ValueError(f"{NAME}: codes must be finite, got NaN or inf")
        if isinstance(part, torch.Tensor):
            found.append(part.cpu().double())
            continue
        slots = slots_of(part)
        n = torch.Size(part.shape[:-1]).numel()
        at = slots.tokens.cpu().numpy(), slots.features.cpu().numpy()
        made = csr_array((slots.values.cpu().double().numpy(), at), shape=(n, part.n_features))
        found.append(made)
    kinds = {isinstance(one, torch.Tensor) for one in found}
    if len(widths) != 1 or len(kinds) != 1:
        raise ValueError(
            f"{NAME}: codes must be of one kind, with one number of features, got widths "
            f"{sorted(widths)}"
        )
    if isinstance(found[0], torch.Tensor):
        return torch.cat(found), widths.pop()
    return vstack(found, format="csr"), widths.pop()


class _Best:
    """The k best pairs of blocks."""

    def __init__(self, k: int):
        self.k = k
        self.found = np.empty((4, 0))

    def add(self, first: Any, second: Any, scores: Any, together: Any) -> None:
        new = np.stack([np.asarray(t, np.float64) for t in (first, second, scores, together)])
        both = np.concatenate([self.found, new[:, ~np.isnan(new[2])]], 1)
        order = np.lexsort((both[1], both[0], -both[2]))[: self.k]
        self.found = both[:, order]


def _measured(
    by: str, n: int, g: Any, c: Any, i: Any, j: Any, squares: Any, means: Any, counts: Any
) -> np.ndarray:
    """Of pairs i, j with products g and counts c."""
    with np.errstate(divide="ignore", invalid="ignore"):
        if by == "jaccard":
            return c / (counts[i] + counts[j] - c)
        if by == "pmi":
            return np.log(n * c / (counts[i] * counts[j]))
        if by == "cosine":
            return g / np.sqrt(squares[i] * squares[j])
        if by == "product":
            return g
        spread = np.sqrt(np.maximum(squares / n - means**2, 0))
        return (g / n - means[i] * means[j]) / (spread[i] * spread[j])


def _entries(matrix: Any, rows: np.ndarray, cols: np.ndarray) -> np.ndarray:
    """Of a sparse matrix; sums that cancel to 0 may have no entry."""
    coo, width = matrix.tocoo(), matrix.shape[1]
    keys = coo.row.astype(np.int64) * width + coo.col
    order = np.argsort(keys)
    wanted = rows * width + cols
    at = np.searchsorted(keys[order], wanted)
    if not len(order):
        return np.zeros(len(wanted))
    at = order[np.minimum(at, len(order) - 1)]
    return np.where(keys[at] == wanted, coo.data[at], 0.0)


def _sparse_pairs(
    x: Any, by: str, k: int, least: int, squares: np.ndarray, means: np.ndarray,
    counts: np.ndarray,
) -> np.ndarray:  # fmt: skip
    """`[4, k]` of CSR `[N, n]`."""
    n_tokens, n = x.shape
    active = x.copy()
    active.data[:] = 1
    # at most so many entries has each row of g
    width = active.T @ active.sum(1)
    best, columns, marks = _Best(k), x.tocsc(), active.tocsc()
    ends = np.searchsorted(np.cumsum(width), np.arange(BLOCK, width.sum() + BLOCK, BLOCK)) + 1
    begin = 0
    for end in np.unique(np.minimum(ends, n)).tolist():
        together = (marks[:, begin:end].T @ active).tocoo()
        i, j, c = together.row.astype(np.int64) + begin, together.col, together.data
        kept = (j > i) & (c >= least)
        i, j, c = i[kept], j[kept], c[kept]
        g = _entries(columns[:, begin:end].T @ x, i - begin, j) if by in PRODUCTS else c
        best.add(i, j, _measured(by, n_tokens, g, c, i, j, squares, means, counts), c)
        begin = end
    return best.found


def _dense_pairs(x: torch.Tensor, by: str, k: int) -> np.ndarray:
    """`[4, k]` of `[N, n]`."""
    rows = x.T
    if by == "correlation":
        rows = rows - rows.mean(1, keepdim=True)
    if by != "product":
        norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
        rows = (rows / norms).where(norms > 0, 0)
    found = pairwise_topk(rows.contiguous(), k=k, by="value", upper=True)
    together = ((x[:, found.rows] != 0) & (x[:, found.cols] != 0)).sum(0)
    return np.stack([t.double().numpy() for t in (found.rows, found.cols, found.values, together)])


def _groups(pairs: tuple[Pair, ...]) -> tuple[tuple[int, ...], ...]:
    """Connected components."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    if not pairs:
        return ()
    names, ends = np.unique([[p.first, p.second] for p in pairs], return_inverse=True)
    ends = ends.reshape(-1, 2)
    edges = coo_array((np.ones(len(ends)), (ends[:, 0], ends[:, 1])), shape=(len(names),) * 2)
    _, label = connected_components(edges, directed=False)
    found = [tuple(names[label == one].tolist()) for one in np.unique(label)]
    return tuple(sorted(found, key=lambda group: (-len(group), group)))


@torch.no_grad()
def coactivation(
    codes: Codes | Iterable[Codes], *, k: int = 20, by: str = "cosine", least: int = 2
) -> Coactivation:
    """Which features, or neurons, are active on the same tokens.

    Args:
        codes: SparseCodes of an SAE; or dense activations `[tokens, neurons]`, for example of
            `neuron_activations`; or an iterable of batches of either. All leading dimensions of
            codes are tokens.
        k: pairs that are kept.
        by: the measure that ranks them, see above: of dense activations "cosine", "correlation" or
            "product".
        least: tokens on which both must be active; of codes only. Features that are active once
            have the largest jaccard and pmi with whatever was active there.

    Returns:
        Coactivation: prints as a table; `.groups` are its connected components,
        `.components(features=group)` their principal components. In float64, on the CPU.

    Raises:
        TypeError, ValueError: for other codes, of several widths or not finite; another measure.

    Example:
        >>> codes = sae.encode(torch.randn(1000, 24))
        >>> found = circuits.coactivation(codes, by="jaccard", k=100, least=10)
        >>> found.n_tokens, len(found.pairs)
        (1000, 100)
    """
    for name, value in (("k", k), ("least", least)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{NAME}: {name} must be at least 1, got {value!r}")
    if by not in PRODUCTS + COUNTS:
        raise ValueError(f"{NAME}: by must be one of {PRODUCTS + COUNTS}, got {by!r}")
    x, n_features = _read(codes)
    dense = isinstance(x, torch.Tensor)
    if dense and by in COUNTS:
        raise ValueError(
            f"{NAME}: by must be one of {PRODUCTS} for dense activations, got {by!r}; give "
            f"SparseCodes, for example SparseCodes.from_dense(x.relu())"
        )
    n_tokens = x.shape[0]
    if dense:
        counts = (x != 0).sum(0)
    else:
        counts = torch.from_numpy(np.bincount(x.indices, minlength=n_features))
    features = counts.nonzero()[:, 0]
    x = x[:, features if dense else features.numpy()]
    sums = torch.from_numpy(np.asarray(x.sum(0), np.float64))
    counts, means = counts[features], sums / max(1, n_tokens)
    if dense:
        found = _dense_pairs(x, by, k)
        x = x.numpy()
    else:
        squares = np.asarray(x.multiply(x).sum(0)).reshape(-1)
        found = _sparse_pairs(x, by, k, least, squares, means.numpy(), counts.numpy())
    pairs = tuple(
        Pair(int(features[int(i)]), int(features[int(j)]), float(score), int(together))
        for i, j, score, together in found.T
    )
    return Coactivation(by, n_tokens, n_features, features, counts, means, pairs, _groups(pairs), x)
