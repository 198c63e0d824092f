# SPDX-License-Identifier: Apache-2.0
"""What a model is asked about: one number per prompt, of its logits after the last token.

With l the logits `[V]` at a row's last position that is not padding, and
`lse(S) = log(sum of exp(l_t) over t in S)`,

| target | its number |
|---|---|
| `a`, a token | `l_a` |
| `(a, b)`, a pair | `l_a - l_b`, the logit difference |
| `{a, b}`, a set: a behaviour such as refusal | `lse(S) - lse(all)`, its log probability |
| `(S, T)`, a pair of sets, or of a set and a token | `lse(S) - lse(T)`, the log odds |
| a callable | what it makes of all logits `[B, P, V]`: `[B]` |
| None | `l_a` of the token a that the model predicts |

A token is an id, or its text where there is a tokeniser. A list, or a tensor `[B]`, has one target
per prompt; so may each side of a pair: `(correct, wrong)` with `[B]` ids each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch

from mikernels.models.parts import Decoder

Metric = Callable[[torch.Tensor], torch.Tensor]
# a list, a pair or a set may nest these
Target = int | str | tuple[Any, Any] | set[Any] | frozenset[Any] | list[Any] | torch.Tensor | Metric
Ids = tuple[int, ...]

FORMS = (
    "a token (id, or text with a tokenizer), a pair (a, b), a set, a list or tensor with one of "
    "these per prompt, or a callable"
)


@dataclass(frozen=True)
class _Row:
    """Of one prompt: `lse(plus) - lse(minus)`; `whole`: minus that of all tokens."""

    plus: Ids
    minus: Ids = ()
    whole: bool = False


def last_logits(logits: torch.Tensor, kept: torch.Tensor | None) -> torch.Tensor:
    """`[B, V]` of `[B, P, V]`, at the last position that is not padding."""
    if kept is None:
        return logits[:, -1]
    last = kept.shape[1] - 1 - kept.int().flip(-1).argmax(-1)
    return logits[torch.arange(len(last), device=logits.device), last.to(logits.device)]


def piece(token: int, tokenizer: Any) -> str:
    """A token's text; without a tokenizer that decodes, its id."""
    decode = getattr(tokenizer, "decode", None)
    return str(token) if decode is None else decode([token])


def _quoted(token: int, tokenizer: Any) -> str:
    text = piece(token, tokenizer)
    return text if text == str(token) else repr(text)


def _ids_of(text: str, tokenizer: Any) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def token_id(where: str, text: str, tokenizer: Any) -> int:
    """The id of a text that is one token.

    Raises:
        TypeError: without a tokenizer.
        ValueError: it is none or several, with these and the spellings nearby that are one.
    """
    if tokenizer is None:
        raise TypeError(
            f"{where}: target {text!r} must be a token id without a tokenizer; give tokenizer="
        )
    ids = _ids_of(text, tokenizer)
    unknown = getattr(tokenizer, "unk_token_id", None)
    if len(ids) == 1 and (ids[0] != unknown or piece(ids[0], tokenizer).strip() == text.strip()):
        return ids[0]
    word = text.strip()
    near = {f" {word}", word, f" {word.capitalize()}", word.capitalize(), f" {word.lower()}"}
    one = sorted(
        other for other in near - {text, "", " "}
        if len(found := _ids_of(other, tokenizer)) == 1 and found[0] != unknown
    )  # fmt: skip
    fix = f"write {' or '.join(map(repr, one))}, or give an id" if one else "give a token's id"
    pieces = " + ".join(repr(piece(i, tokenizer)) for i in ids)
    got = f"{len(ids)}: {pieces}" if len(ids) > 1 else "none: the vocabulary has no such text"
    raise ValueError(f"{where}: target {text!r} must be one token, got {got}; {fix}")


def vocabulary(decoder: Decoder) -> int | None:
    """How many logits the model gives; None where it does not say."""
    head, model = decoder.unembedding, decoder.model
    weight, own = (getattr(head, name, None) for name in ("weight", "W_U"))
    if isinstance(weight, torch.Tensor) and weight.dim() == 2:
        # of quantised layers the weight is packed
        return int(getattr(head, "out_features", weight.shape[0]))
    if isinstance(own, torch.Tensor) and own.dim() == 2:
        return int(own.shape[1])
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    size = getattr(config, "vocab_size", None)
    return size if isinstance(size, int) else None


class _Reader:
    """Reads targets for a number of prompts."""

    def __init__(self, where: str, rows: int, size: int | None, tokenizer: Any):
        self.where, self.rows, self.size, self.tokenizer = where, rows, size, tokenizer

    def wrong(self, got: str) -> ValueError:
        return ValueError(f"{self.where}: target must be {FORMS}, got {got}")

    def token(self, value: Any) -> int:
        if isinstance(value, str):
            return self.known(token_id(self.where, value, self.tokenizer))
        if isinstance(value, torch.Tensor) and value.dim() == 0:
            if value.is_floating_point() or value.dtype == torch.bool:
                raise self.wrong(f"{value.dtype} []")
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise self.wrong(repr(value))
        return self.known(int(value))

    def known(self, token: int) -> int:
        if token < 0 or (self.size is not None and token >= self.size):
            size = "" if self.size is None else f" in 0..{self.size - 1} (vocabulary)"
            raise ValueError(f"{self.where}: target must be{size}, got {token}")
        return token

    def tokens(self, value: Any) -> Ids:
        """Of a side of a pair: a token or a set."""
        if not isinstance(value, set | frozenset):
            return (self.token(value),)
        if not value:
            raise ValueError(f"{self.where}: target must be a set of tokens, got an empty one")
        return tuple(sorted({self.token(one) for one in value}))

    def row(self, value: Any) -> _Row:
        if isinstance(value, set | frozenset):
            return _Row(self.tokens(value), whole=True)
        if not isinstance(value, tuple):
            return _Row((self.token(value),))
        if len(value) != 2:
            raise self.wrong(f"a tuple of {len(value)}")
        plus, minus = map(self.tokens, value)
        if both := set(plus) & set(minus):
            same = _quoted(min(both), self.tokenizer)
            raise ValueError(
                f"{self.where}: target must be a pair of different tokens, got {same} on both sides"
            )
        return _Row(plus, minus)

    def each(self, value: Any) -> list[Any] | None:
        """One per prompt; None for what is one for all."""
        if isinstance(value, torch.Tensor) and value.dim() > 0:
            if value.is_floating_point() or value.dtype == torch.bool or value.dim() > 2 or (
                value.dim() == 2 and value.shape[1] != 2
            ) or len(value) != self.rows:  # fmt: skip
                raise ValueError(
                    f"{self.where}: target must be a token id or [{self.rows}] of them, or pairs "
                    f"[{self.rows}, 2], got {value.dtype} {list(value.shape)}"
                )
            return [tuple(one) if isinstance(one, list) else one for one in value.tolist()]
        if isinstance(value, list):
            if len(value) != self.rows:
                raise ValueError(
                    f"{self.where}: target must be a list of one per prompt ({self.rows}), got "
                    f"{len(value)}; a pair is a tuple (a, b), a behaviour a set {{a, b}}"
                )
            return value
        if isinstance(value, tuple) and len(value) == 2:
            sides = [self.each(side) for side in value]
            if any(side is not None for side in sides):
                spread = (
                    [one] * self.rows if side is None else side
                    for side, one in zip(sides, value, strict=True)
                )  # fmt: skip
                return list(zip(*spread, strict=True))
        return None

    def read(self, target: Any) -> list[_Row]:
        each = self.each(target)
        if each is None:
            return [self.row(target)] * self.rows
        rows = [self.row(one) for one in each]
        if len({(bool(row.minus), row.whole) for row in rows}) > 1:
            raise ValueError(
                f"{self.where}: target must be of one form for all prompts, got tokens, pairs or "
                f"sets in one list"
            )
        return rows


def _side(ids: Sequence[Ids], logits: torch.Tensor) -> torch.Tensor:
    """`[B]`: lse of each row's own tokens."""
    width = max(map(len, ids))
    index = torch.tensor([[*row, *[-1] * (width - len(row))] for row in ids], device=logits.device)
    found = logits.gather(1, index.clamp(min=0))
    if width == 1:
        return found[:, 0]
    return found.masked_fill(index < 0, -torch.inf).logsumexp(-1)


@dataclass(frozen=True)
class Behavior:
    """A target, read and checked, for the prompts of one call.

    Attributes:
        where: of messages.
        label: in words.
        rows: of each prompt; None for the model's prediction, and for a callable.
        function: a callable target.
    """

    where: str
    label: str
    rows: tuple[_Row, ...] | None = None
    function: Metric | None = None

    def __getitem__(self, part: slice) -> Behavior:
        """That of some of the prompts."""
        return Behavior(self.where, self.label, self.rows and self.rows[part], self.function)

    def only_last(self, kept: torch.Tensor | None) -> bool:
        """Whether it needs no logits but those of the last position."""
        return self.function is None and (kept is None or bool(kept[:, -1].all()))

    def __call__(self, logits: torch.Tensor, kept: torch.Tensor | None) -> torch.Tensor:
        """`[B]` of logits `[B, P, V]`.

        Args:
            kept: the positions `[B, P]` that are not padding, None for all.

        Raises:
            ValueError: for logits that are not finite; a callable's result that is not one finite
                number for each row, or does not depend on the logits.
        """
        last = last_logits(logits, kept)
        if not (finite := last.isfinite().all(-1)).all():
            raise ValueError(
                f"{self.where}: model must return finite logits, got NaN or inf in row "
                f"{int(finite.int().argmin())}; mend its weights, or load it in a wider dtype"
            )
        if self.function is not None:
            return self._called(logits)
        if self.rows is None:
            return last.gather(1, last.argmax(-1, keepdim=True))[:, 0]
        plus = _side([row.plus for row in self.rows], last)
        if self.rows[0].whole:
            return plus - last.logsumexp(-1)
        return plus - _side([r.minus for r in self.rows], last) if self.rows[0].minus else plus

    def _called(self, logits: torch.Tensor) -> torch.Tensor:
        assert self.function is not None
        rows, name = len(logits), self.label
        value = self.function(logits)
        if isinstance(value, torch.Tensor) and value.dim() == 0 and rows == 1:
            value = value[None]
        if not isinstance(value, torch.Tensor) or value.shape != (rows,):
            got = type(value).__name__
            if isinstance(value, torch.Tensor):
                got = str(list(value.shape))
            raise ValueError(
                f"{self.where}: target {name} must return a scalar for each prompt, [{rows}], of "
                f"logits {list(logits.shape)}, got {got}; leave out a mean over prompts, add one "
                f"over what else there is"
            )
        if not value.is_floating_point() or not value.isfinite().all():
            raise ValueError(
                f"{self.where}: target {name} must return finite numbers, got {value.dtype} "
                f"{value.tolist()}"
            )
        if logits.requires_grad and not value.requires_grad:
            raise ValueError(
                f"{self.where}: target {name} must depend on the logits, got a constant; leave out "
                f"detach, item and argmax"
            )
        return value


def _label(rows: list[_Row], tokenizer: Any) -> str:
    def text(ids: Ids) -> str:
        shown = ", ".join(_quoted(i, tokenizer) for i in ids[:6])
        more = f", ... ({len(ids)})" if len(ids) > 6 else ""
        return shown if len(ids) == 1 else f"{{{shown}{more}}}"

    first, same = rows[0], len(set(rows)) == 1
    if first.whole:
        return f"log probability of {text(first.plus) if same else 'a set of tokens per prompt'}"
    if not first.minus:
        return f"logit of {text(first.plus) if same else 'a token per prompt'}"
    single = all(len(row.plus) == len(row.minus) == 1 for row in rows)
    name = "logit difference" if single else "log odds"
    sides = f"{text(first.plus)} - {text(first.minus)}" if same else "a pair per prompt"
    return f"{name} {sides}" if same else f"{name} of {sides}"


def read_target(
    where: str,
    target: Target | None,
    rows: int,
    size: int | None = None,
    tokenizer: Any = None,
) -> Behavior:
    """Read a target before the model runs.

    Args:
        where: of messages: the public function.
        target: see the table above.
        rows: prompts, B.
        size: of the vocabulary, None for one that is not known.
        tokenizer: for texts, and for the label.

    Raises:
        TypeError: a text without a tokenizer.
        ValueError: another form; a token outside of the vocabulary; a text that is not one token; a
            pair with the same token on both sides; an empty set; not one per prompt.
    """
    if target is None:
        return Behavior(where, "logit of the predicted token")
    if callable(target) and not isinstance(target, torch.Tensor):
        name = getattr(target, "__name__", type(target).__name__)
        return Behavior(where, name, function=target)
    found = _Reader(where, rows, size, tokenizer).read(target)
    return Behavior(where, _label(found, tokenizer), tuple(found))
