# SPDX-License-Identifier: Apache-2.0
"""The names of the package `gim` (PyPI `gim-explain`, 0.1.4) on `mikernels.models.rules`.

    from mikernels.integrations import gim

    with gim.GIM(model):
        model(input_ids).logits[0, -1, target].backward()
    gim.explain(model, input_ids, tokenizer=tokenizer)

What is said is what the package says: scales of norms are constants, attention's softmax is
differentiated at a temperature, gradients of q, k and v are multiplied by 1/4, 1/4 and 1/2. The
paper (Edin et al., arXiv 2505.17630) also halves the gradients of the two factors of a gated MLP;
0.1.4 does not, so it is off unless `mlp_scale=0.5` is given. `rules(model, "gim")` is the paper's.

Where the package acts, the gradients are the same. Where it does not (of Hugging Face models all
norms but torch's own, all softmaxes but of eager GPT-2, q, k and v but under sdpa) these act, and a
rule that does not act raises. It patches functions of torch for the whole process; rules are hooks
on this model, for this thread. `explain` leaves no `.grad` behind, and takes rows of a batch for
texts of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from mikernels.models.decoder import find_decoder
from mikernels.models.rules import RuleReport, rules

__all__ = ["GIM", "explain"]

FIX = "use another method for it"


@contextmanager
def GIM(  # noqa: N802
    model: torch.nn.Module,
    *,
    freeze_norm: bool = True,
    softmax_temperature: float | None = 2.0,
    q_scale: float | None = 0.25,
    k_scale: float | None = 0.25,
    v_scale: float | None = 0.5,
    mlp_scale: float | None = None,
) -> Iterator[RuleReport]:
    """In the `with` block the model's backward is that of GIM; its forward is unchanged.

    Args:
        model: a Hugging Face decoder or a HookedTransformer, in eval mode.
        freeze_norm: norms' scales are constants.
        softmax_temperature: of the softmax in attention's backward; None or 1 for its own.
        q_scale, k_scale, v_scale: factors of the gradients of q, k and v; None for 1.
        mlp_scale: factor of the gradients of both factors of a gated MLP, 1/2 in the paper.

    Yields:
        RuleReport: what each rule did.

    Raises:
        TypeError, ValueError, RuntimeError: as `rules`.
    """
    said = {
        "norm": "frozen" if freeze_norm else None,
        "softmax": None if softmax_temperature == 1 else softmax_temperature,
        "query": q_scale,
        "key": k_scale,
        "value": v_scale,
        "gate": mlp_scale,
        "up": mlp_scale,
    }
    if all(value is None for value in said.values()):
        # a rule that every model has a place for, and that changes nothing
        said["query"] = 1.0
    with rules(model, **said) as report:  # type: ignore[arg-type]
        yield report


def _baseline(tokenizer: Any) -> int:
    """The token of a space, else of padding, else the unknown one."""
    try:
        space = list(tokenizer.encode(" ", add_special_tokens=False))
    except (AttributeError, TypeError, ValueError):
        # not all tokenisers encode, or know the option
        space = []
    others = [getattr(tokenizer, f"{name}_token_id", None) for name in ("pad", "unk")]
    for token in (*space[:1], *others):
        if token is not None:
            return int(token)
    raise ValueError(
        "explain: tokenizer must have a token for a space, padding or the unknown, got none; give "
        "baseline_token_id"
    )


def explain(
    model: torch.nn.Module,
    input_ids: torch.Tensor,
    *,
    target_token_id: int | None = None,
    target_position: int = -1,
    baseline_token_id: int | None = None,
    tokenizer: Any | None = None,
    freeze_norm: bool = True,
    softmax_temperature: float | None = 2.0,
    q_scale: float | None = 0.25,
    k_scale: float | None = 0.25,
    v_scale: float | None = 0.5,
    mlp_scale: float | None = None,
) -> torch.Tensor:
    """What each token adds to a logit, by GIM.

        a_p = sum_d (E[token_p] - E[baseline])_d  d logit / d E[token_p]_d

    Args:
        model: as for `GIM`.
        input_ids: `[P]` or `[B, P]`, without padding.
        target_token_id: the logit's token; None is the one that the model predicts, for each row.
        target_position: where.
        baseline_token_id: the token that stands for nothing.
        tokenizer: in its place, for the token of a space (else of padding, else the unknown).
        freeze_norm, softmax_temperature, q_scale, k_scale, v_scale, mlp_scale: as for `GIM`.

    Returns:
        `[P]`, or `[B, P]` of several rows, in the dtype of the embeddings.

    Raises:
        TypeError, ValueError, RuntimeError: as `rules`; for tokens, a target, a baseline or a
            position that the model does not have.
    """
    decoder = find_decoder(model, "explain", FIX)
    if baseline_token_id is None:
        if tokenizer is None:
            raise ValueError("explain: baseline_token_id or tokenizer must be given, got neither")
        baseline_token_id = _baseline(tokenizer)
    ids = input_ids[None] if input_ids.dim() == 1 else input_ids
    if ids.dim() != 2 or not ids.numel():
        raise ValueError(
            f"explain: input_ids must be [P] or [B, P], not empty, got {list(input_ids.shape)}"
        )
    if (embed := decoder.embedding) is None:
        raise decoder.refusal("it names no embedding")
    known = len(next(embed.parameters()))
    for name, least, most in (
        ("input_ids", int(ids.min()), int(ids.max())),
        ("baseline_token_id", baseline_token_id, baseline_token_id),
    ):
        if least < 0 or most >= known:
            raise ValueError(
                f"explain: {name} must be in 0..{known - 1} (vocabulary), got "
                f"{least if least < 0 else most}"
            )
    if not -ids.shape[1] <= target_position < ids.shape[1]:
        raise ValueError(
            f"explain: target_position must be in {-ids.shape[1]}..{ids.shape[1] - 1} (positions), "
            f"got {target_position}"
        )
    with torch.no_grad():
        clean, baseline = embed(ids), embed(torch.full_like(ids[:1, :1], baseline_token_id))
    with ExitStack() as stack:
        # switches gradients on, also within the caller's no_grad
        stack.enter_context(torch.inference_mode(False))
        leaf = clean.clone().requires_grad_()
        stack.enter_context(
            GIM(
                model,
                freeze_norm=freeze_norm,
                softmax_temperature=softmax_temperature,
                q_scale=q_scale,
                k_scale=k_scale,
                v_scale=v_scale,
                mlp_scale=mlp_scale,
            )
        )
        stack.callback(embed.register_forward_hook(lambda *call: leaf).remove)
        logits = decoder.logits({"input_ids": ids})[:, target_position]
        if target_token_id is None:
            targets = logits.detach().argmax(-1)
        elif 0 <= target_token_id < logits.shape[-1]:
            targets = torch.full(logits.shape[:1], target_token_id, device=logits.device)
        else:
            raise ValueError(
                f"explain: target_token_id must be in 0..{logits.shape[-1] - 1} (vocabulary), got "
                f"{target_token_id}"
            )
        (grad,) = torch.autograd.grad(logits.gather(1, targets[:, None]).sum(), leaf)
    found = (grad * (clean - baseline)).sum(-1)
    return found[0] if len(ids) == 1 else found
