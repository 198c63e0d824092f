# SPDX-License-Identifier: Apache-2.0
"""What heads attend to: the token before, the same token, what followed the same token.

With P the pattern of a head, and ids x, the mean over queries t with such a key of

    previous-token   P[t, t - 1]
    duplicate-token  sum of P[t, s] over s < t with x_s = x_t
    induction        sum of P[t, s] over s <= t with x_(s-1) = x_t

(Olsson et al., "In-context Learning and Induction Heads", 2022). The model runs with the attention
that it has, of any implementation; the patterns are made of the queries, keys, mask, scale, cap and
window that this gets, some queries at a time, and `P V` must be what it returned, within rounding:
patterns that are not the model's own are an error.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from mikernels._dispatch import accumulate_dtype
from mikernels.circuits.passes import run
from mikernels.circuits.prompts import Inputs, Prompts, read_prompts
from mikernels.circuits.report import page, parts
from mikernels.circuits.targets import vocabulary
from mikernels.models.decoder import find_decoder
from mikernels.models.hooks import check_uncompiled, original
from mikernels.models.parts import Decoder
from mikernels.models.rules.attention import (
    Attend,
    Call,
    intercept,
    limits,
    masks_itself,
    meaning,
)

NAME = "head_scores"
FIX = "read its attention patterns with hooks of your own"
KINDS = ("induction", "previous_token", "duplicate_token")
# numbers of patterns at a time
CHUNK = 1 << 24


@dataclass(frozen=True, eq=False)
class HeadScores:
    """`[layers, heads]` each, in 0..1: how much of its attention a head gives, on average.

    Prints as a table of the strongest heads of each kind.

    Attributes:
        induction: to what followed the same token. previous_token: to the token before.
            duplicate_token: to the same token.
    """

    induction: torch.Tensor
    previous_token: torch.Tensor
    duplicate_token: torch.Tensor

    def top(self, kind: str, k: int = 5) -> list[tuple[str, float]]:
        """The k heads with the largest score of a kind: `("L11.h4", 0.93)`.

        Raises:
            ValueError: for another kind.
        """
        if kind not in KINDS:
            raise ValueError(f"HeadScores: kind must be one of {KINDS}, got {kind!r}")
        scores = getattr(self, kind)
        best = scores.flatten().argsort(descending=True, stable=True)[:k].tolist()
        heads = scores.shape[1]
        return [(f"L{i // heads}.h{i % heads}", scores.flatten()[i].item()) for i in best]

    def _rows(self) -> list[tuple[str, ...]]:
        columns = [[f"{name} {score:.2f}" for name, score in self.top(kind)] for kind in KINDS]
        return [tuple(kind.replace("_", " ") for kind in KINDS), *zip(*columns, strict=True)]

    def __str__(self) -> str:
        return "\n".join("  ".join(cell.ljust(15) for cell in row).rstrip() for row in self._rows())

    def __rich__(self) -> Table:
        head, *rows = self._rows()
        table = Table(*head)
        for row in rows:
            table.add_row(*row)
        return table

    def maps(self) -> list[dict[str, Any]]:
        """Of a page: a heat map each."""
        return [
            parts.heat_map(kind.replace("_", " ").capitalize(), getattr(self, kind), signed=False)
            for kind in KINDS
        ]

    def to_html(self, path: str | Path | None = None) -> str:
        """One self-contained page with a heat map of layers and heads for each kind.

        Args:
            path: also written there.
        """
        return page.write(NAME, "What heads attend to", "", [parts.maps(self.maps())], path)


@dataclass(frozen=True, eq=False)
class Patterns:
    """The attention patterns of some heads.

    Attributes:
        names: of n heads, as `L3.h7`.
        tokens: of each prompt, as text (ids without a tokenizer), without padding.
        weights: of each prompt `[n, P, P]` float32, without padding: how much each token (a row)
            attends to each (a column). A row adds up to 1.
    """

    names: tuple[str, ...]
    tokens: list[list[str]]
    weights: list[torch.Tensor]


def _marks(ids: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """`[3, B, P, P]`: the keys that count for each query, of each of KINDS."""
    p = ids.shape[1]
    at = torch.arange(p, device=ids.device)
    known = kept[:, :, None] & kept[:, None, :]
    same = (ids[:, :, None] == ids[:, None, :]) & known & (at[:, None] > at)
    induction = torch.zeros_like(same)
    # the key after it, which may be the query itself
    induction[:, :, 1:] = same[:, :, :-1]
    previous = known & (at[:, None] - 1 == at)
    return torch.stack([induction, previous, same])


class _Watched(ABC):
    """Hands the patterns of each layer to `take`, some queries at a time, while the model runs."""

    def __init__(self, decoder: Decoder):
        self._layers: dict[torch.nn.Module, int] = {
            block.attention: block.index for block in decoder.blocks
        }
        self._refusal = decoder.refusal
        self.seen: set[int] = set()
        self.kept = torch.empty(0)

    def under(self, name: str, function: Attend) -> Attend:
        def attend(module, q, k, v, mask=None, **options):  # type: ignore[no-untyped-def]
            out, weights = function(module, q, k, v, mask, **options)
            layer = self._layers[module]
            causal = masks_itself(name, module, q, mask, options)
            call = Call(f"block {layer}", function, module, mask, options, causal, [], set())
            self._add(layer, call, q, k, v, out.transpose(1, 2))
            return out, weights

        return attend

    def _add(
        self, layer: int, call: Call, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
        out: torch.Tensor,
    ) -> None:  # fmt: skip
        b, h, t, _ = q.shape
        if t != self.kept.shape[1] or k.shape[2] != t:
            raise self._refusal(f"{call.place} attends with {t} queries to {k.shape[2]} keys")
        for row in range(b):
            for part in torch.arange(t).split(max(1, CHUNK // (h * t))):
                rows = slice(int(part[0]), int(part[-1]) + 1)
                kept = self.kept[row, rows].to(q.device)
                p = _patterns(call, q, k, v, out, kept, row, rows, self._refusal)
                self.take(layer, row, rows, p)
        self.seen.add(layer)

    @abstractmethod
    def take(self, layer: int, row: int, rows: slice, p: torch.Tensor) -> None:
        """The patterns `[H, rows, S]` of a layer and prompt."""

    def run(self, name: str, decoder: Decoder, some: Prompts) -> None:
        """The model over some prompts.

        Raises:
            ValueError: a layer's attention calls no function, or another than it should.
        """
        self.kept = some.mask
        self.seen.clear()
        with ExitStack() as stack:
            for block in decoder.blocks:
                undo = intercept(name, block.attention, f"block {block.index}", self.under, FIX)
                stack.callback(undo)
            run(decoder, some.given, last=True)
        if missing := set(range(len(decoder.blocks))) - self.seen:
            raise decoder.refusal(f"attention of block {min(missing)} calls no function")


class _Totals(_Watched):
    """Adds up what the heads of each layer attend to."""

    def __init__(self, decoder: Decoder, device: torch.device):
        super().__init__(decoder)
        heads = [decoder.heads(block).query for block in decoder.blocks]
        self.totals = [torch.zeros(3, h, dtype=torch.float64, device=device) for h in heads]
        self.counts = torch.zeros(3, dtype=torch.float64, device=device)
        self.marks = torch.empty(0)

    def take(self, layer: int, row: int, rows: slice, p: torch.Tensor) -> None:
        marks = self.marks[:, row, rows].to(p.device)
        found = torch.einsum("hqk,cqk->ch", p, marks.to(p.dtype))
        self.totals[layer] += found.to(self.totals[layer])


class _Chosen(_Watched):
    """Keeps the patterns of some heads, `[B, n, P, P]`."""

    def __init__(self, decoder: Decoder, heads: Sequence[tuple[int, int]], prompts: Prompts):
        super().__init__(decoder)
        self._heads = heads
        b, p = prompts.ids.shape
        self.weights = torch.zeros(b, len(heads), p, p)

    def take(self, layer: int, row: int, rows: slice, p: torch.Tensor) -> None:
        for i, (wanted, head) in enumerate(self._heads):
            if wanted == layer:
                self.weights[row, i, rows] = p[head].to(self.weights)


def _patterns(
    call: Call, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor,
    kept: torch.Tensor, row: int, rows: slice, refusal: Callable[[str], Exception],
) -> torch.Tensor:  # fmt: skip
    """`[H, rows, S]` of one prompt; its product with v is what the call returned, or ValueError."""
    acc = accumulate_dtype(q.dtype)
    said = meaning(call, q, k)
    group = q.shape[1] // k.shape[1]
    some = q[row : row + 1, :, rows].to(acc)
    keys, values = (x[row].to(acc).repeat_interleave(group, 0) for x in (k, v))
    raw = some[0] @ keys.transpose(-1, -2) * said["scale"]
    scores = said["softcap"] * (raw / said["softcap"]).tanh() if said["softcap"] else raw
    for name in ("keep", "bias"):
        mask = said[name]
        if mask is None:
            continue
        mask = mask[row if len(mask) > 1 else 0]
        mask = mask[..., rows, :] if mask.shape[-2] > 1 else mask
        scores = scores + mask.to(acc) if name == "bias" else scores.masked_fill(~mask, -torch.inf)
    if said["causal"]:
        i = torch.arange(q.shape[2], device=q.device)[rows, None]
        j = torch.arange(k.shape[2], device=q.device)
        seen = (j <= i) & (j > i - said["window"]) if said["window"] else j <= i
        scores = scores.masked_fill(~seen, -torch.inf)
    # at padding it may be anything
    p = scores.softmax(-1).masked_fill(~kept[:, None], 0)
    largest = values.abs().amax(1, keepdim=True)
    made = p @ values
    away = ((made - out[row, :, rows]).abs() / largest).where(made != out[row, :, rows], 0)
    size = raw.abs().masked_fill(p == 0, 0).amax(-1)[None]
    limit = limits(call, some, k[row : row + 1], size)[0, ..., None]
    bad = ~(away <= limit) & kept[:, None]
    if bad.any():
        head, query, _ = bad.nonzero()[0].tolist()
        raise refusal(
            f"attention of {call.place} must be softmax(q k^T) v of its arguments: head {head} at "
            f"query {query + (rows.start or 0)} is {float(away[bad].max()):.3g} of its largest "
            f"value away from that, with rounding {float(limit.max()):.2g}"
        )
    return p


def _repeated(
    decoder: Decoder, tokenizer: Any, prompts: int, length: int, seed: int
) -> torch.Tensor:
    """`[prompts, 2 length]`, or with a first token that the tokeniser begins with."""
    size = vocabulary(decoder)
    if size is None:
        raise ValueError(f"{NAME}: input_tokens must be given for a model of unknown vocabulary")
    special = torch.tensor(sorted(getattr(tokenizer, "all_special_ids", None) or []))
    allowed = torch.arange(size)
    allowed = allowed[~torch.isin(allowed, special)]
    generator = torch.Generator().manual_seed(seed)
    # different ones, so that each has been seen once
    drawn = torch.stack(
        [
            allowed[torch.randperm(len(allowed), generator=generator)[:length]]
            for _ in range(prompts)
        ]
    )
    start = tokenizer("")["input_ids"] if tokenizer is not None else []
    first = torch.tensor(start, dtype=torch.int64).expand(prompts, -1)
    return torch.cat([first, drawn, drawn], 1)


def _chunks(prompts: Prompts, step: int) -> Iterator[Prompts]:
    for begin in range(0, len(prompts.ids), step):
        yield prompts.rows(slice(begin, begin + step))


@torch.no_grad()
def head_scores(
    model: torch.nn.Module,
    input_tokens: Inputs | None = None,
    *,
    tokenizer: Any = None,
    seed: int = 0,
    batch_size: int = 8,
) -> HeadScores:
    """Induction, previous-token and duplicate-token scores of all heads, from their patterns.

    Args:
        model: a Hugging Face causal language model in eval mode, with any attention that goes
            through transformers' attention functions (sdpa and eager are tested).
        input_tokens: as for `gim_probe`; None: 8 prompts of 32 random tokens, twice each.
        tokenizer: for texts; without input_tokens, for its first token and to leave out special
            ones.
        seed: of random tokens.
        batch_size: prompts at a time.

    Returns:
        HeadScores: `[layers, heads]` for each kind; NaN where no query has such a key.

    Raises:
        TypeError, ValueError: for a model that is not recognised, in training mode or compiled;
            whose layers differ in heads; whose attention is another than softmax(q k^T) v.

    Example:
        >>> found = circuits.head_scores(model, tokenizer=tokenizer)
        >>> found.induction.shape  # of every layer's heads
        torch.Size([3, 4])
    """
    model = original(model)
    decoder = find_decoder(model, NAME, FIX)
    decoder.check_eval()
    check_uncompiled(NAME, model)
    if input_tokens is None:
        input_tokens = _repeated(decoder, tokenizer, 8, 32, seed)
    prompts = read_prompts(decoder, "input_tokens", input_tokens, tokenizer)
    heads = _Totals(decoder, prompts.ids.device)
    if len({len(total[0]) for total in heads.totals}) > 1:
        raise decoder.refusal("its layers have different numbers of heads")
    for some in _chunks(prompts, batch_size):
        heads.marks = _marks(some.ids, some.mask)
        heads.counts += heads.marks.any(-1).sum((1, 2))
        heads.run(NAME, decoder, some)
    totals = torch.stack([total.to(heads.counts.device) for total in heads.totals], 1)
    return HeadScores(*(totals / heads.counts[:, None, None]).float())


def _numbers(decoder: Decoder, names: Sequence[str]) -> list[tuple[int, int]]:
    """Layer and head of each `L3.h7`."""
    known = {
        f"L{block.index}.h{head}": (block.index, head)
        for block in decoder.blocks
        for head in range(decoder.heads(block).query)
    }
    if isinstance(names, str) or not names or not set(names) <= known.keys():
        got = names if isinstance(names, str) else [n for n in names if n not in known][:3]
        raise ValueError(
            f"attention_patterns: heads must be some of L0.h0 to {list(known)[-1]}, got "
            f"{got or 'none'}"
        )
    return [known[name] for name in names]


@torch.no_grad()
def attention_patterns(
    model: torch.nn.Module, input_tokens: Inputs, heads: Sequence[str], *, tokenizer: Any = None
) -> Patterns:
    """What some heads attend to, token by token, whatever attention the model runs with.

    Args:
        model, input_tokens, tokenizer: as for `head_scores`.
        heads: their names, as `L3.h7`.

    Returns:
        Patterns: `[n, P, P]` for each prompt, in memory at once.

    Raises:
        TypeError, ValueError: as `head_scores`; for heads that the model does not have.

    Example:
        >>> text = "Mary and John and Mary"
        >>> found = circuits.attention_patterns(model, text, ["L1.h2"], tokenizer=tokenizer)
        >>> found.weights[0].shape
        torch.Size([1, 5, 5])
    """
    name = "attention_patterns"
    model = original(model)
    decoder = find_decoder(model, name, FIX)
    decoder.check_eval()
    check_uncompiled(name, model)
    numbers = _numbers(decoder, heads)
    prompts = read_prompts(decoder, "input_tokens", input_tokens, tokenizer)
    chosen = _Chosen(decoder, numbers, prompts)
    chosen.run(name, decoder, prompts)
    weights = [
        weight[:, kept][:, :, kept]
        for weight, kept in zip(chosen.weights, prompts.mask.cpu(), strict=True)
    ]
    return Patterns(tuple(heads), prompts.texts(tokenizer), weights)
