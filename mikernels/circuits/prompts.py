# SPDX-License-Identifier: Apache-2.0
"""Prompts in any form that people have them in, as the keywords of a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mikernels.circuits.targets import piece
from mikernels.models.padding import with_positions
from mikernels.models.parts import Decoder

Inputs = torch.Tensor | str | Sequence[Any] | Mapping[str, Any]
FORMS = (
    "token ids [P] or [B, P], what a tokenizer returned, or a text or list of texts with a "
    "tokenizer"
)


@dataclass(frozen=True, eq=False)
class Prompts:
    """B prompts, padded to P tokens.

    Attributes:
        given: the keywords of the model, with `input_ids [B, P]`.
        kept: the positions `[B, P]` that are not padding, None for all.
    """

    given: dict[str, Any]
    kept: torch.Tensor | None

    @property
    def ids(self) -> torch.Tensor:
        return self.given["input_ids"]

    @property
    def mask(self) -> torch.Tensor:
        return torch.ones_like(self.ids, dtype=torch.bool) if self.kept is None else self.kept

    def texts(self, tokenizer: Any) -> list[list[str]]:
        """The tokens of each prompt, padding left out."""
        return [
            [piece(token, tokenizer) for token in row[kept].tolist()]
            for row, kept in zip(self.ids, self.mask, strict=True)
        ]

    def rows(self, part: slice) -> Prompts:
        """Some of them."""
        return self._each(lambda value: value[part])

    def times(self, n: int) -> Prompts:
        """All of them n times over."""
        return self._each(lambda value: value.repeat(n, *[1] * (value.dim() - 1)))

    def _each(self, make: Callable[[torch.Tensor], torch.Tensor]) -> Prompts:
        b = len(self.ids)
        given = {
            name: make(value) if isinstance(value, torch.Tensor) and len(value) == b else value
            for name, value in self.given.items()
        }
        return Prompts(given, None if self.kept is None else make(self.kept))


def pad_left(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    """Rows of different lengths with padding before them, which the mask leaves out."""
    width = max(map(len, rows))
    ids = [[row[0]] * (width - len(row)) + row for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    given = {"input_ids": torch.tensor(ids)}
    if any(len(row) < width for row in rows):
        given["attention_mask"] = torch.tensor(mask)
    return given


def _encoded(where: str, name: str, inputs: Any, tokenizer: Any) -> dict[str, Any]:
    if isinstance(inputs, Mapping):
        return dict(inputs)
    if isinstance(inputs, torch.Tensor):
        return {"input_ids": inputs}
    rows: Any = [inputs] if isinstance(inputs, str) else inputs
    if not isinstance(rows, Sequence) or not len(rows):
        got = type(inputs).__name__ if not isinstance(rows, Sequence) else "none"
        raise TypeError(f"{where}: {name} must be {FORMS}, got {got}")
    if all(isinstance(row, str) for row in rows):
        if tokenizer is None:
            raise TypeError(
                f"{where}: {name} must be token ids without a tokenizer, got text; give tokenizer="
            )
        rows = [list(tokenizer(row)["input_ids"]) for row in rows]
    elif all(isinstance(row, int) for row in rows):
        rows = [list(rows)]
    if not all(isinstance(row, list | tuple) and row for row in rows):
        kinds = sorted({type(row).__name__ for row in rows})
        raise TypeError(f"{where}: {name} must be {FORMS}, got a list of {', '.join(kinds)}")
    if not all(isinstance(one, int) for row in rows for one in row):
        raise TypeError(f"{where}: {name} must be {FORMS}, got lists of something else")
    return pad_left([list(row) for row in rows])


def _check_ids(where: str, name: str, ids: Any, size: int | None) -> None:
    if not isinstance(ids, torch.Tensor) or ids.dim() != 2 or ids.numel() == 0:
        got = list(ids.shape) if isinstance(ids, torch.Tensor) else type(ids).__name__
        raise ValueError(f"{where}: {name} must be {FORMS}, not empty, got input_ids {got}")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(f"{where}: {name} must be {FORMS}, got input_ids of {ids.dtype}")
    least, most = ids.aminmax()
    if least < 0 or (size is not None and most >= size):
        wrong = int(least if least < 0 else most)
        raise ValueError(
            f"{where}: {name} must be in 0..{'' if size is None else size - 1} (embeddings), got "
            f"{wrong}; use the model's own tokenizer"
        )


def _check_padding(where: str, name: str, ids: torch.Tensor, pad: Any) -> None:
    """No padding that a mask would have to name: at the end, or several in front."""
    if not isinstance(pad, int) or len(ids) < 2:
        return
    is_pad = ids == pad
    found = is_pad[:, -1] | is_pad[:, :2].all(-1)
    if found.any() and not is_pad.all():
        raise ValueError(
            f"{where}: {name} must have an attention_mask with padding, got padding tokens ({pad}) "
            f"in row {int(found.int().argmax())} without one; pass what the tokenizer returned, or "
            f"texts"
        )


def embeddings(decoder: Decoder) -> torch.Tensor | None:
    """Of the tokens, `[V, d]`; None for a model that names none."""
    found = (getattr(decoder.embedding, name, None) for name in ("weight", "W_E"))
    return next((x for x in found if isinstance(x, torch.Tensor) and x.dim() == 2), None)


def read_prompts(decoder: Decoder, name: str, inputs: Inputs, tokenizer: Any = None) -> Prompts:
    """Read prompts before the model runs; texts of different lengths are padded before them.

    Args:
        decoder: gets them, on the device of its embeddings.
        name: of messages: the argument.
        inputs: token ids `[P]` or `[B, P]`, or lists of them; what a tokeniser returned; a text or
            several.
        tokenizer: for texts; its padding token is not taken for a token.

    Raises:
        TypeError, ValueError: another form; texts without a tokenizer; ids that the embedding does
            not have; padding without an attention_mask, or another mask (`with_positions`).
    """
    where = decoder.where
    given = _encoded(where, name, inputs, tokenizer)
    ids = given.get("input_ids")
    if isinstance(ids, torch.Tensor) and ids.dim() == 1:
        given = {
            key: value[None] if isinstance(value, torch.Tensor) and value.dim() == 1 else value
            for key, value in given.items()
        }
    weight = embeddings(decoder)
    _check_ids(where, name, given.get("input_ids"), None if weight is None else len(weight))
    if given.get("attention_mask") is None:
        _check_padding(where, name, given["input_ids"], getattr(tokenizer, "pad_token_id", None))
    if weight is not None:
        given = {
            key: value.to(weight.device) if isinstance(value, torch.Tensor) else value
            for key, value in given.items()
        }
    return Prompts(*with_positions(where, decoder.model, given, decoder.counts_positions))


def check_aligned(
    where: str,
    clean: Prompts,
    other: Prompts,
    name: str = "input_tokens",
    other_name: str = "counterfactual",
) -> None:
    """A counterfactual prompt for every prompt, token by token.

    Args:
        name, other_name: of messages: the arguments.

    Raises:
        ValueError: another shape or padding, with the row; one that is the prompt itself.
    """
    same_shape = clean.ids.shape == other.ids.shape
    if same_shape and torch.equal(clean.mask.sum(-1), other.mask.sum(-1)):
        moved = (clean.mask != other.mask).any(-1)
        if moved.any():
            row = int(moved.int().argmax())
            at = [int(prompts.mask[row].int().argmax()) for prompts in (clean, other)]
            raise ValueError(
                f"{where}: {other_name} must have its padding where {name} has it, got the first "
                f"token of row {row} at {at[1]} and {at[0]}; pad both on the same side"
            )
    else:
        lengths = [list(map(int, prompts.mask.sum(-1))) for prompts in (clean, other)]
        row = next(
            (i for i, (a, b) in enumerate(zip(*lengths, strict=False)) if a != b),
            min(map(len, lengths)) if len(lengths[0]) != len(lengths[1]) else 0,
        )
        counts = [n[row] if row < len(n) else 0 for n in lengths]
        raise ValueError(
            f"{where}: {other_name} must have the tokens of {name} one by one, got "
            f"{counts[1]} tokens for {counts[0]} in row {row} ({list(other.ids.shape)} for "
            f"{list(clean.ids.shape)}); replace words by words of as many tokens"
        )
    changed = ((clean.ids != other.ids) & clean.mask).any(-1)
    if not changed.all():
        raise ValueError(
            f"{where}: {other_name} must differ from {name}, got the same tokens in row "
            f"{int((~changed).int().argmax())}, whose scores would all be 0"
        )
