# SPDX-License-Identifier: Apache-2.0
"""Which tokens of a prompt an answer rests on: input embeddings times gradients under rules.

For token t of a prompt, with E its input embedding, g the gradient of the answer's number there and
E' a baseline's embedding,

    a_t = sum over d of (E_t - E') g_t

(Edin et al., arXiv 2505.17630). E is what the model's embedding returns, before what a model adds
to it (positions) or makes of it (Gemma's factor).
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from rich.text import Text

from mikernels._dispatch import accumulate_dtype
from mikernels.circuits.passes import gradients, run, under
from mikernels.circuits.prompts import Inputs, Prompts, embeddings, read_prompts
from mikernels.circuits.report import page, parts
from mikernels.circuits.targets import Target, read_target, token_id, vocabulary
from mikernels.models.decoder import find_decoder
from mikernels.models.hooks import frozen, original, returned
from mikernels.models.parts import Decoder
from mikernels.models.rules import RuleReport, Rules

NAME = "attribute"
FIX = "take the gradient at its embeddings with hooks of your own"


@dataclass(frozen=True, eq=False)
class TokenAttribution:
    """What each token adds to the answer's number. Prints as a table.

    Attributes:
        label: of the number, in words.
        values: `[B]`, the number.
        tokens: of each prompt, as text (ids without a tokenizer), without padding.
        scores: `[B, P]` float32, 0 at padding.
        kept: `[B, P]`: the positions that are not padding.
        rules: what the backward rules acted on, None without any.
    """

    label: str
    values: torch.Tensor
    tokens: list[list[str]]
    scores: torch.Tensor
    kept: torch.Tensor
    rules: RuleReport | None

    @property
    def positions(self) -> list[list[tuple[str, float]]]:
        """Of each prompt, each token with its score."""
        return [
            list(zip(tokens, row[kept].tolist(), strict=True))
            for tokens, row, kept in zip(self.tokens, self.scores, self.kept, strict=True)
        ]

    def _title(self, row: int) -> str:
        return f"{self.label}: {self.values[row].item():.3f}"

    def __str__(self) -> str:
        blocks = []
        for row, prompt in enumerate(self.positions):
            width = max(len(repr(token)) for token, _ in prompt)
            lines = [f"{token!r:{width}}  {score:+9.4f}" for token, score in prompt]
            blocks.append("\n".join([self._title(row), *lines]))
        return "\n\n".join(blocks)

    def __rich__(self) -> Table:
        table = Table("token", title=f"{self.label} ({len(self.values)} prompts)")
        table.add_column("score", justify="right")
        for prompt in self.positions:
            for token, score in prompt:
                colour = "green" if score > 0 else "red"
                table.add_row(Text(repr(token)), Text(f"{score:+.4f}", style=colour))
            table.add_section()
        return table

    def to_html(self, path: str | Path | None = None) -> str:
        """One self-contained page with the text, its tokens shaded.

        Args:
            path: also written there.

        Raises:
            ModuleNotFoundError: without the `report` extra. OSError: it cannot be written.
        """
        several = len(self.values) > 1
        title = f"{self.label} of {len(self.values)} prompts" if several else self._title(0)
        return page.write(NAME, title, "", [self.section(), *parts.rules(self.rules)], path)

    def section(self) -> parts.Part:
        """Of a page: the text, its tokens shaded."""
        note = "What each token's embedding adds, to first order."
        return parts.text("Tokens", note, self.positions)


def _baseline(decoder: Decoder, embedded: torch.Tensor, baseline: Any) -> torch.Tensor:
    """What stands for no token, `[d]` or of the shape of the embeddings."""
    assert decoder.embedding is not None
    if isinstance(baseline, torch.Tensor) and baseline.is_floating_point():
        if baseline.shape not in (embedded.shape, embedded.shape[-1:]):
            raise ValueError(
                f"{NAME}: baseline must be [{embedded.shape[-1]}] or {list(embedded.shape)}, got "
                f"{list(baseline.shape)}"
            )
        return baseline.to(embedded)
    if baseline == "zero":
        return torch.zeros_like(embedded[0, 0])
    with torch.no_grad():
        return decoder.embedding(torch.tensor([[baseline]], device=embedded.device))[0, 0]


def _baseline_id(baseline: Any, tokenizer: Any, size: int) -> Any:
    """An id, "zero" or a tensor, read before the model runs."""
    if baseline is None:
        baseline = "zero" if tokenizer is None else " "
    if isinstance(baseline, str) and baseline != "zero":
        try:
            return token_id(NAME, baseline, tokenizer)
        except ValueError as error:
            reason = str(error).replace("target", "baseline", 1)
            raise ValueError(f"{reason}, or baseline='zero'") from None
    if isinstance(baseline, int) and not isinstance(baseline, bool):
        if not 0 <= baseline < size:
            raise ValueError(f"{NAME}: baseline must be in 0..{size - 1}, got {baseline}")
    elif baseline != "zero" and not (
        isinstance(baseline, torch.Tensor) and baseline.is_floating_point()
    ):
        raise ValueError(
            f"{NAME}: baseline must be 'zero', a token (id, or text with a tokenizer) or a "
            f"floating tensor [d] or [B, P, d], got {baseline!r}"
        )
    return baseline


def attribute(
    model: torch.nn.Module,
    prompt: Inputs,
    target: Target | None = None,
    *,
    tokenizer: Any = None,
    baseline: Any = None,
    rules: str | Rules | None = "gim",
) -> TokenAttribution:
    """Which tokens of a prompt an answer rests on.

    Args:
        model: a Hugging Face causal language model in eval mode that the rules know.
        prompt, target, tokenizer, rules: as for `gim_probe`.
        baseline: what stands for no token: a token (id, or text), "zero", or an embedding `[d]` or
            `[B, P, d]`; None: the space, as in the package gim-explain, or "zero" without a
            tokenizer.

    Returns:
        TokenAttribution: prints as a table; `.to_html()`.

    Raises:
        TypeError, ValueError: as `gim_probe`, and for another baseline.

    Example:
        >>> text = "When Mary and John went to the store, John gave a drink to"
        >>> print(circuits.attribute(
        ...     model, text, (" Mary", " John"), tokenizer=tokenizer, baseline="zero"
        ... ))
        logit difference 'Mary' - 'John': ...
        'When' ...
        'Mary' ...
    """
    model = original(model)
    decoder = find_decoder(model, NAME, FIX)
    decoder.check_eval()
    weight = embeddings(decoder)
    if weight is None:
        raise decoder.refusal("it names no input embedding")
    prompts = read_prompts(decoder, "prompt", prompt, tokenizer)
    behavior = read_target(NAME, target, len(prompts.ids), vocabulary(decoder), tokenizer)
    baseline = _baseline_id(baseline, tokenizer, len(weight))
    with under(model, rules) as report:
        values, embedded, g = _at_embeddings(decoder, prompts, behavior)
    away = embedded - _baseline(decoder, embedded, baseline)
    acc = accumulate_dtype(embedded.dtype)
    scores = (away.to(acc) * g.to(acc)).sum(-1).float()
    scores = scores.where(prompts.mask, 0)
    if not scores.isfinite().all():
        raise ValueError(
            f"{NAME}: gradients must be finite, got NaN or inf; load the model in a wider dtype"
        )
    return TokenAttribution(
        behavior.label, values, prompts.texts(tokenizer), scores, prompts.mask, report
    )


def _at_embeddings(
    decoder: Decoder, prompts: Prompts, behavior: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The numbers `[B]`, the embeddings `[B, P, d]` and the gradients there."""
    found: list[torch.Tensor] = []

    def enter(module: torch.nn.Module, args: Any, output: Any) -> torch.Tensor:
        x = returned(output)
        if x.shape[:2] != prompts.ids.shape or found:
            raise decoder.refusal("its embedding is not called once with the prompt's tokens")
        found.append(x.detach().requires_grad_())
        return found[0]

    assert decoder.embedding is not None
    with frozen(decoder.model), ExitStack() as stack:
        stack.callback(decoder.embedding.register_forward_hook(enter).remove)
        last = behavior.only_last(prompts.kept)
        logits = run(decoder, prompts.given, last)
        values = behavior(logits, None if last else prompts.kept)
        if not found:
            raise decoder.refusal("its embedding is not called")
        (g,) = gradients(decoder, values, {"the embeddings": found[0]})
    return values.detach(), found[0].detach(), g
