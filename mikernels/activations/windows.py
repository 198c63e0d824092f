# SPDX-License-Identifier: Apache-2.0
"""Text as windows of token ids, read as they are needed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

# characters given to the tokeniser at a time, cut at a line end: documents of any length stream
PIECE = 1 << 15


def begins_with_bos(tokenizer: Any) -> bool:
    """Whether the tokeniser puts a beginning-of-text token before a text."""
    return tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]


def text_of(tokenizer: Any, token: int) -> str:
    """A token's text as it stands within a text.

    Tokenisers of the SentencePiece kind drop the space of a text's first token: what a token adds
    to itself has it.
    """
    alone, twice = tokenizer.decode([token]), tokenizer.decode([token, token])
    return twice[len(alone) :] if twice.startswith(alone) else alone


def _tokens(tokenizer: Any, texts: Iterable[str]) -> Iterator[int]:
    """Documents joined by the end-of-text token."""
    end = tokenizer.eos_token_id
    for document in texts:
        start = 0
        while start < len(document):
            stop = document.rfind("\n", start, start + PIECE) + 1
            if stop <= start or start + PIECE >= len(document):
                stop = start + PIECE
            piece = document[start:stop]
            yield from tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
            start = stop
        if document and end is not None:
            yield end


def token_windows(
    tokenizer: Any,
    texts: Iterable[str],
    context: int,
    *,
    max_tokens: int | None = None,
    bos: bool = False,
    skip_first: int = 0,
) -> Iterator[torch.Tensor]:
    """Windows `[context]` of token ids in reading order.

    Args:
        tokenizer: a Hugging Face tokeniser.
        texts: documents.
        context: tokens of a window; the last one may be shorter, if it is longer than skip_first.
        max_tokens: tokens of the text that are read; None is all.
        bos: begin each window with the beginning-of-text token.
        skip_first: positions of a window that are of no use.
    """
    first = [tokenizer.bos_token_id] if bos else []
    window = list(first)
    for count, token in enumerate(_tokens(tokenizer, texts)):
        if max_tokens is not None and count >= max_tokens:
            break
        window.append(token)
        if len(window) == context:
            yield torch.tensor(window, dtype=torch.int64)
            window = list(first)
    if len(window) > max(skip_first, len(first)):
        yield torch.tensor(window, dtype=torch.int64)
