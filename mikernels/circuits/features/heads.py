# SPDX-License-Identifier: Apache-2.0
"""OV and QK circuits: what a head writes when it attends to something, and what it attends to.

For head h, with rows u, v of embeddings or feature directions and N, N' the norms before attention
and at the end without their scales (gains, and means taken off),

    OV[u, s] = N'(N(u) W_V W_O) . (W_U[s] - mean of W_U)   what attending to u adds to the logit of
                                                         token s, over the mean logit
    QK[u, v] = (N(u) W_Q) . (N(v) W_K) / sqrt(dh)          how much u attends to v

(Elhage et al., "A Mathematical Framework for Transformer Circuits", transformer-circuits.pub,
2021). Both are products of two `[n, dh]` matrices, so the strongest pairs of all tokens are found
by `pairwise_topk` and no V x V matrix is formed.

What is left out: the norms' scales, which are one positive number for each token that reads or is
read; biases of q, k, v and the projection, whose share depends on one side alone, times such a
scale; and rotary positions, so that QK is that of a key at the query's own position.

The copying score of OV over all tokens is `sum of lambda / sum of |lambda|` over its eigenvalues:
1 where attending to any token promotes it. They are those of a `[dh, dh]` matrix, since A B^T and
B^T A have the same, but for zeros.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from rich.text import Text

from mikernels._dispatch import accumulate_dtype
from mikernels.circuits.features.readout import ROWS, Readout, find_readout, through
from mikernels.circuits.prompts import embeddings
from mikernels.circuits.targets import piece, token_id
from mikernels.models.decoder import find_decoder
from mikernels.models.hooks import original
from mikernels.models.parts import Decoder, is_norm
from mikernels.models.readers import Norm, Reading, wire
from mikernels.nn import SAE
from mikernels.ops.pairs.pairwise_topk import check_selection, pairwise_topk
from mikernels.values.interactions import Interactions

FIX = "multiply its weights by hand"
_NAME = re.compile(r"L(\d+)\.h(\d+)")
Side = SAE | torch.Tensor | Sequence[int | str] | None


@dataclass(frozen=True, eq=False)
class HeadCircuit:
    """The strongest pairs of a head's circuit. Prints as a table.

    Attributes:
        kind: "OV" or "QK". head: as `L3.h7`.
        pairs: the k strongest, rows and columns as numbers on their side.
        names: of each pair: tokens as text, features as `f123`, directions as numbers.
        copying: of OV from all tokens to all tokens, -1..1; else None.
    """

    kind: str
    head: str
    pairs: Interactions
    names: tuple[tuple[str, str], ...]
    copying: float | None

    def to_rows(self) -> list[dict[str, Any]]:
        """For a report, JSON-able."""
        return [
            {"from": a, "to": b, "score": score}
            for (a, b), score in zip(self.names, self.pairs.values.tolist(), strict=True)
        ]

    def _title(self) -> str:
        copying = "" if self.copying is None else f", copying score {self.copying:+.2f}"
        return f"{self.kind} of {self.head}{copying}"

    def _cells(self) -> list[tuple[str, str, str]]:
        head = ("reads", "writes") if self.kind == "OV" else ("query", "key")
        rows = zip(self.names, self.pairs.values.tolist(), strict=True)
        return [(*head, "score"), *((a, b, f"{score:+.4g}") for (a, b), score in rows)]

    def __str__(self) -> str:
        cells = self._cells()
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        rows = [f"{a:{widths[0]}}  {b:{widths[1]}}  {c:>{widths[2]}}" for a, b, c in cells]
        return "\n".join([self._title(), *rows])

    def __rich__(self) -> Table:
        head, *rows = self._cells()
        table = Table(title=self._title(), title_justify="left")
        for name in head:
            table.add_column(name, justify="right" if name == "score" else "left")
        for row in rows:
            table.add_row(*map(Text, row))
        return table


class _Head:
    """One head of a model, its weights without what depends on a token."""

    def __init__(self, where: str, model: torch.nn.Module, head: str):
        self.where, self.name = where, head
        self.decoder = find_decoder(original(model), where, FIX)
        self.decoder.check_eval()
        match = _NAME.fullmatch(head) if isinstance(head, str) else None
        layers = len(self.decoder.blocks)
        if match is None or int(match[1]) >= layers:
            raise ValueError(
                f"{where}: head must be one of layers 0..{layers - 1}, such as 'L0.h0', got "
                f"{head!r}"
            )
        self.wiring = wire(self.decoder)
        self.reading: Reading = self.wiring.layers[int(match[1])]
        self.w_o = self.wiring.w_o[int(match[1])]
        self.number, count = int(match[2]), len(self.w_o)
        if self.number >= count:
            raise ValueError(
                f"{where}: head must be one of h0..h{count - 1} in layer {match[1]}, got {head!r}"
            )

    def weight(self, part: str) -> torch.Tensor:
        """`[d, dh]` of "q", "k" or "v": its own, or its group's."""
        weight = getattr(self.reading, part).weight
        return weight[self.number * len(weight) // len(self.w_o)]

    def rows(self, name: str, given: Side, reads: bool = False) -> torch.Tensor:
        """`[n, d]` of a side: an SAE's rows (of its encoder where it reads), directions, or
        embeddings of some or all tokens."""
        if isinstance(given, SAE):
            rows: Any = given.w_enc if reads else given.w_dec
        elif isinstance(given, torch.Tensor) and given.is_floating_point():
            rows = given
        else:
            raise TypeError(
                f"{self.where}: {name} must be None (all tokens), some tokens (ids, texts with a "
                f"tokenizer), an SAE of mikernels.nn, or directions [n, {self.decoder.d}], got "
                f"{type(given).__name__}"
            )
        if rows.dim() != 2 or rows.shape[1] != self.decoder.d or not rows.isfinite().all():
            raise ValueError(
                f"{self.where}: {name} must be finite and of the model's width, "
                f"[n, {self.decoder.d}], got {list(rows.shape)}"
            )
        return rows.detach()


def _tokens(where: str, given: Any, size: int, tokenizer: Any) -> list[int] | None:
    """Ids of a side that names some tokens; None for one that is something else."""
    if isinstance(given, str):
        given = [given]
    integers = isinstance(given, torch.Tensor) and not given.is_floating_point()
    if not integers and not (isinstance(given, Sequence) and len(given)):
        return None
    ids = given.tolist() if integers else list(given)
    try:
        ids = [token_id(where, one, tokenizer) if isinstance(one, str) else one for one in ids]
    except (TypeError, ValueError) as error:
        raise type(error)(str(error).replace("target", "tokens", 1)) from None
    for one in ids:
        if isinstance(one, bool) or not isinstance(one, int) or not 0 <= one < size:
            raise ValueError(f"{where}: tokens must be in 0..{size - 1}, got {one!r}")
    return ids


def _times(norm: Norm | None, rows: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """`N(rows) w`, in at least float32, some rows at a time."""
    acc = accumulate_dtype(torch.promote_types(rows.dtype, w.dtype))
    w = w.to(acc)
    return torch.cat([through(norm, part.to(w)) @ w for part in rows.split(ROWS)])


class _Side:
    """One side of a circuit: its rows times what they meet, and their names."""

    def __init__(
        self, head: _Head, name: str, given: Side, tokens: torch.Tensor | None, tokenizer: Any,
        reads: bool = False,
    ):  # fmt: skip
        self.ids: list[int] | None = None
        self.all_tokens = given is None
        self._tokenizer, self._features = tokenizer, isinstance(given, SAE)
        self.of_tokens = True
        size = 0 if tokens is None else len(tokens)
        if given is None or (found := _tokens(head.where, given, size, tokenizer)) is not None:
            if tokens is None:
                raise head.decoder.refusal("it names no embedding")
            self.ids = None if given is None else found
            self.rows = tokens if self.ids is None else tokens[self.ids]
        else:
            self.of_tokens = False
            self.rows = head.rows(name, given, reads)

    def name(self, number: int) -> str:
        if self.of_tokens:
            token = number if self.ids is None else self.ids[number]
            text = piece(token, self._tokenizer)
            return text if text == str(token) else repr(text)
        return f"f{number}" if self._features else str(number)


def _circuit(
    kind: str, head: _Head, a: torch.Tensor, b: torch.Tensor, sides: tuple[_Side, _Side], k: int,
    by: str, copying: float | None,
) -> HeadCircuit:  # fmt: skip
    found = pairwise_topk(a, b, k=k, by=by)
    rows, cols = found.rows.tolist(), found.cols.tolist()
    names = tuple(
        (sides[0].name(i), sides[1].name(j)) for i, j in zip(rows, cols, strict=True)
    )  # fmt: skip
    return HeadCircuit(kind, head.name, found, names, copying)


def _copying(a: torch.Tensor, b: torch.Tensor) -> float:
    """Of A B^T."""
    values = torch.linalg.eigvals(b.double().T @ a.double())
    size = float(values.abs().sum())
    return float(values.real.sum()) / size if size else 0.0


@torch.inference_mode(False)
@torch.no_grad()
def ov_circuit(
    model: torch.nn.Module,
    head: str,
    *,
    inputs: Side = None,
    outputs: Side = None,
    k: int = 20,
    by: str = "value",
    tokenizer: Any = None,
) -> HeadCircuit:
    """What a head writes for what it attends to: the strongest pairs.

    Args:
        model: a Hugging Face causal language model in eval mode, or a HookedTransformer.
        head: as "L3.h7".
        inputs: None: the embeddings of all tokens; some tokens (ids, or texts); an SAE, of whose
            features the decoder's rows; or directions `[n, d]`.
        outputs: None: the unembeddings of all tokens; some tokens; an SAE that reads the residual
            stream later, of whose features the encoder's rows (without a norm between); or
            directions `[m, d]`, likewise.
        k: pairs. by: "value", largest first, or "abs".
        tokenizer: for texts, and to name tokens.

    Raises:
        TypeError, ValueError: for another head or side; a model whose arithmetic is another.

    Example:
        >>> found = circuits.ov_circuit(model, "L1.h2", k=5, tokenizer=tokenizer)
        >>> len(found.to_rows())
        5
    """
    where = "ov_circuit"
    check_selection(where, k, by, None)
    one = _Head(where, model, head)
    readout: Readout = find_readout(one.decoder)
    source = _Side(one, "inputs", inputs, embeddings(one.decoder), tokenizer)
    target = _Side(one, "outputs", outputs, readout.w_u, tokenizer, reads=True)
    a = _times(one.reading.norm, source.rows, one.weight("v"))
    written = through(one.reading.written, one.w_o[one.number].to(a))
    written = through(readout.norm, written) if target.of_tokens else written
    b = _times(None, target.rows, written.T)
    if target.of_tokens:
        b = b - readout.centre.to(b) @ written.T.to(b)
    copying = _copying(a, b) if source.all_tokens and target.all_tokens else None
    return _circuit("OV", one, a, b.to(a), (source, target), k, by, copying)


@torch.inference_mode(False)
@torch.no_grad()
def qk_circuit(
    model: torch.nn.Module,
    head: str,
    *,
    queries: Side = None,
    keys: Side = None,
    k: int = 20,
    by: str = "value",
    tokenizer: Any = None,
) -> HeadCircuit:
    """What a head attends to: the strongest pairs of a query and a key at its own position.

    Args:
        model, head, k, by, tokenizer: as for `ov_circuit`.
        queries, keys: as its inputs.

    Raises:
        TypeError, ValueError: as `ov_circuit`; and for a model that norms its queries and keys,
            which are then no product of what is read.

    Example:
        >>> names = [" Mary", " John"]
        >>> found = circuits.qk_circuit(model, "L1.h2", keys=names, k=5, tokenizer=tokenizer)
        >>> len(found.to_rows())
        5
    """
    where = "qk_circuit"
    check_selection(where, k, by, None)
    one = _Head(where, model, head)
    _check_plain(one.decoder, one.reading)
    sides = tuple(
        _Side(one, name, given, embeddings(one.decoder), tokenizer)
        for name, given in (("queries", queries), ("keys", keys))
    )
    w_q, w_k = one.weight("q"), one.weight("k")
    a = _times(one.reading.norm, sides[0].rows, w_q) * w_q.shape[-1] ** -0.5
    b = _times(one.reading.norm, sides[1].rows, w_k)
    return _circuit("QK", one, a, b.to(a), (sides[0], sides[1]), k, by, None)


def _check_plain(decoder: Decoder, reading: Reading) -> None:
    attention = reading.block.attention
    for name, module in attention.named_modules():
        sizes = {int(p.shape[-1]) for p in module.parameters(recurse=False)}
        if any(is_norm(module, size) for size in sizes) and module is not attention:
            raise decoder.refusal(
                f"attention of block {reading.block.index} norms its queries or keys ({name})"
            )
