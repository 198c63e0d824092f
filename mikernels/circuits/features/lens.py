# SPDX-License-Identifier: Apache-2.0
"""Which tokens a feature speaks for: its decoder row through the final norm and the unembedding.

    s = (gain (W[f] - mean(W[f]))) W_U^T, less its mean over the vocabulary

what the feature adds to the logits straight from the residual stream, at an activation of 1 and
times the norm's scale at the token (`mikernels.circuits.features.readout` says what is left out).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from rich.text import Text

from mikernels.circuits.features.readout import find_readout
from mikernels.circuits.targets import piece
from mikernels.models.decoder import find_decoder
from mikernels.models.hooks import original
from mikernels.nn import SAE

NAME = "logit_lens"
FIX = "multiply its unembedding with the directions"


@dataclass(frozen=True, eq=False)
class LogitLens:
    """The tokens of some directions. Prints as a table.

    Attributes:
        names: of the n directions: `f123`, or their numbers.
        promoted, suppressed: `[n, k]` int64, token ids, strongest first.
        promoted_scores, suppressed_scores: `[n, k]`, s of these.
    """

    names: tuple[str, ...]
    promoted: torch.Tensor
    promoted_scores: torch.Tensor
    suppressed: torch.Tensor
    suppressed_scores: torch.Tensor
    _tokenizer: Any = None

    def tokens(self, row: int, suppressed: bool = False) -> list[tuple[str, float]]:
        """Of one direction each token as text (its id without a tokenizer) with its score."""
        ids = self.suppressed if suppressed else self.promoted
        scores = self.suppressed_scores if suppressed else self.promoted_scores
        pairs = zip(ids[row].tolist(), scores[row].tolist(), strict=True)
        return [(piece(token, self._tokenizer), score) for token, score in pairs]

    def to_rows(self) -> list[dict[str, Any]]:
        """For a report, JSON-able."""
        return [
            {"name": name, "promoted": self.tokens(row), "suppressed": self.tokens(row, True)}
            for row, name in enumerate(self.names)
        ]

    def _cells(self) -> list[tuple[str, ...]]:
        found: list[tuple[str, ...]] = [("", "promotes", "suppresses")]
        for row, name in enumerate(self.names):
            words = (
                " ".join(repr(token) for token, _ in self.tokens(row, side))
                for side in (False, True)
            )
            found.append((name, *words))
        return found

    def __str__(self) -> str:
        cells = self._cells()
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        return "\n".join(
            "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip()
            for row in cells
        )

    def __rich__(self) -> Table:
        head, *rows = self._cells()
        table = Table(*head)
        for row in rows:
            table.add_row(*map(Text, row))
        return table


def _directions(
    what: SAE | torch.Tensor, features: Sequence[int] | None, d: int
) -> tuple[torch.Tensor, list[int]]:
    """`[n, d]`, and their numbers."""
    rows = what.w_dec.detach() if isinstance(what, SAE) else what
    if not isinstance(rows, torch.Tensor) or not rows.is_floating_point():
        raise TypeError(
            f"{NAME}: directions must be an SAE of mikernels.nn or a floating tensor [n, {d}], got "
            f"{rows.dtype if isinstance(rows, torch.Tensor) else type(rows).__name__}"
        )
    if rows.dim() != 2 or rows.shape[1] != d:
        of_layers = hasattr(getattr(what, "config", None), "n_layers")
        fix = "; give the rows of one layer, of its w_dec" if of_layers else ""
        raise ValueError(
            f"{NAME}: directions must be of the model's width, [n, {d}], got {list(rows.shape)}"
            f"{f' of {what.name}' if isinstance(what, SAE) else ''}{fix}"
        )
    given = list(range(len(rows))) if features is None else [int(f) for f in features]
    if wrong := [f for f in given if not 0 <= f < len(rows)]:
        raise ValueError(f"{NAME}: features must be in 0..{len(rows) - 1}, got {wrong[0]}")
    rows = rows if features is None else rows[given]
    if not rows.isfinite().all():
        raise ValueError(f"{NAME}: directions must be finite, got NaN or inf")
    return rows.detach(), given


@torch.inference_mode(False)
@torch.no_grad()
def logit_lens(
    model: torch.nn.Module,
    directions: SAE | torch.Tensor,
    features: Sequence[int] | None = None,
    k: int = 10,
    *,
    tokenizer: Any = None,
) -> LogitLens:
    """The tokens that features promote and suppress.

    (nostalgebraist, "interpreting GPT: the logit lens", 2020, of decoder rows in the place of
    activations.) Scores compare the tokens of one feature, and features of one site; they are no
    logits, since the norm's scale at a token is left out.

    Args:
        model: a Hugging Face causal language model in eval mode, or a HookedTransformer.
        directions: an SAE or transcoder whose output is in the residual stream or is added to it;
            or directions there, `[n, d]`.
        features: their numbers; None: all. k: tokens of each, both ways.
        tokenizer: to name tokens.

    Raises:
        TypeError, ValueError: for other directions, features or k; a model that makes its logits in
            another way than by a norm and a matrix.

    Example:
        >>> found = circuits.logit_lens(model, sae, [12, 34], k=3, tokenizer=tokenizer)
        >>> found.promoted.shape
        torch.Size([2, 3])
    """
    decoder = find_decoder(original(model), NAME, FIX)
    decoder.check_eval()
    rows, given = _directions(directions, features, decoder.d)
    readout = find_readout(decoder)
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= len(readout.w_u):
        raise ValueError(f"{NAME}: k must be in 1..{len(readout.w_u)} (tokens), got {k!r}")
    promoted, promoted_ids = readout.top(rows, k)
    suppressed, suppressed_ids = readout.top(rows, k, -1)
    sign = "f" if isinstance(directions, SAE) else ""
    return LogitLens(
        tuple(f"{sign}{number}" for number in given),
        promoted_ids.cpu(),
        promoted.cpu(),
        suppressed_ids.cpu(),
        suppressed.cpu(),
        tokenizer,
    )
