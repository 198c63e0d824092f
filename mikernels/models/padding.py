# SPDX-License-Identifier: Apache-2.0
"""Padded batches: which tokens there are, and the positions that they have.

A model counts positions from the first column unless it is told otherwise, so a row with padding
before its tokens would be that of a text that begins later. Positions are those that each row has
by itself, `position_ids = cumsum(attention_mask) - 1`, as `generate` counts them (0 at padding).
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch

from mikernels.models.hooks import original


def _takes_positions(model: Any) -> bool:
    model = original(model)
    # adapters pass on what they do not know
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "position_ids" in inspect.signature(model.forward).parameters


def _row(rows: torch.Tensor) -> int:
    return int(rows.int().argmax())


def with_positions(
    where: str, model: torch.nn.Module, inputs: Mapping[str, Any], counted: bool = False
) -> tuple[dict[str, Any], torch.Tensor | None]:
    """Inputs under which every row of a padded batch gives what it gives without its padding.

    Args:
        where: of the error messages.
        model: whose forward gets the inputs.
        inputs: its keywords, with `input_ids [B, P]` or `inputs_embeds [B, P, d]`, and perhaps
            `attention_mask [B, P]`, 1 (or True, 1.0) for a token and 0 for padding, which is before
            or after the tokens of a row or both. `position_ids` of the where's are kept.
        counted: whether the model counts positions from the mask by itself.

    Returns:
        The inputs with position_ids (unless counted), and which positions hold tokens `[B, P]`,
        None if all do.

    Raises:
        TypeError, ValueError: for another mask: of other values or another shape, without a token
            in a row, with padding between tokens; and for padding before tokens where the model's
            forward takes no position_ids.
    """
    given = dict(inputs)
    mask = given.get("attention_mask")
    if mask is None:
        return given, None
    if not isinstance(mask, torch.Tensor):
        raise TypeError(
            f"{where}: attention_mask must be a tensor [B, P], got {type(mask).__name__}; ask "
            f"the tokeniser for return_tensors='pt'"
        )
    content = given.get("input_ids")
    content = given.get("inputs_embeds") if content is None else content
    shape = list(mask.shape if content is None else content.shape[:2])
    if list(mask.shape) != shape or mask.dim() != 2:
        raise ValueError(
            f"{where}: attention_mask must be {shape} with 1 for a token and 0 for padding, got "
            f"{list(mask.shape)}"
        )
    kept = mask == 1
    empty = ~kept.any(-1)
    starts = (kept.int().diff(dim=-1, prepend=kept.new_zeros(len(kept), 1).int()) > 0).sum(-1)
    # one read of the device
    other, some_empty, gaps, padded, before = torch.stack(
        [
            (~kept & (mask != 0)).any(),
            empty.any(),
            (starts > 1).any(),
            ~kept.all(),
            ~kept[:, 0].all(),
        ]
    ).tolist()
    if other:
        odd = mask[~kept & (mask != 0)][0].item()
        raise ValueError(
            f"{where}: attention_mask must hold 1 for a token and 0 for padding, got {odd}; "
            f"scores to be added to the attention's are not supported"
        )
    if some_empty:
        raise ValueError(
            f"{where}: attention_mask must be {shape} with a token in every row, got none in row "
            f"{_row(empty)}; leave that row out"
        )
    if gaps:
        row = _row(starts > 1)
        raise ValueError(
            f"{where}: attention_mask must have padding before or after the tokens of a row only, "
            f"got {mask[row].int().tolist()} in row {row}; leave the tokens between out of "
            f"input_ids"
        )
    given["attention_mask"] = kept.to(torch.int64)
    if not padded:
        return given, None
    if given.get("position_ids") is None and not counted:
        if _takes_positions(model):
            given["position_ids"] = (given["attention_mask"].cumsum(-1) - 1).clamp_(min=0)
        elif before:
            raise ValueError(
                f"{where}: attention_mask must have its padding after the tokens for "
                f"{type(model).__name__}, whose forward takes no position_ids, got padding first "
                f"in row {_row(~kept[:, 0])}; set tokenizer.padding_side = 'right'"
            )
    return given, kept
