# SPDX-License-Identifier: Apache-2.0
"""How a decoder makes logits of its residual stream: the final norm and the unembedding.

    logits = norm(x) W_U^T + b,    norm(x) = gain (x - mean(x)) / scale + c     (RMS: no mean)

What a direction v adds to x, it adds to the logits as `s / scale` while the scale stays as it is,

    s = (gain (v - mean(v))) W_U^T, less its mean over the vocabulary,

since what is added to all logits alike changes no probability. The scale, one positive number for
each token, is the same for all logits, and biases do not depend on v. A soft-cap or a factor that a
model applies to its logits afterwards keeps their order.

That the model does so is checked in a pass over a few tokens: which form the norm has
(`mikernels.models.norms`), that the unembedding reads what the norm returned, and that it is the
product with its matrix.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

from mikernels._dispatch import accumulate_dtype
from mikernels.circuits.passes import run
from mikernels.models.claims import Claims, product_limit
from mikernels.models.hooks import NEVER, returned
from mikernels.models.norms import form_of
from mikernels.models.parts import Decoder, first_tensor
from mikernels.models.readers import TOKENS, Norm
from mikernels.models.watch import Watch
from mikernels.ops.sae.encode import topk_encode
from mikernels.ops.select.row_topk import row_topk

# rows of a matrix that are taken to a wider dtype at a time
ROWS = 1 << 14


def through(norm: Norm | None, rows: torch.Tensor) -> torch.Tensor:
    """Rows `[n, d]` as a norm passes them on, times its scale."""
    if norm is None:
        return rows
    if norm.form is not None and norm.form.centred:
        rows = rows - rows.mean(-1, keepdim=True)
    gain = norm.gain(rows)
    return rows if gain is None else rows * gain


@dataclass(frozen=True, eq=False)
class Readout:
    """Of one model.

    Attributes:
        norm: the final one, None without. w_u: `[V, d]`, a view.
        centre: `[d]`, the mean of its rows, in at least float32.
    """

    norm: Norm | None
    w_u: torch.Tensor
    centre: torch.Tensor

    def folded(self, directions: torch.Tensor) -> torch.Tensor:
        """`gain (v - mean(v))` of `[n, d]`, in at least float32."""
        acc = accumulate_dtype(torch.promote_types(directions.dtype, self.w_u.dtype))
        return through(self.norm, directions.detach().to(self.w_u.device, acc))

    def top(
        self, directions: torch.Tensor, k: int, sign: int = 1
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The k tokens whose logits each direction adds most to, or (-1) least.

        Args:
            directions: `[n, d]`.

        Returns:
            s and token ids, `[n, k]`, strongest first, ties by id; never `[n, V]`.
        """
        rows = self.folded(directions) * sign
        values = rows.new_empty(len(rows), 0)
        ids = torch.empty(len(rows), 0, dtype=torch.int64, device=rows.device)
        begin = 0
        for w in self.w_u.split(ROWS):
            codes = topk_encode(rows, w.to(rows.dtype), k=min(k, len(w)), relu=False)
            # earlier ids come first, so that ties stay in their order
            values = torch.cat([values, codes.values], 1)
            ids = torch.cat([ids, codes.indices + begin], 1)
            begin += len(w)
            values, best = row_topk(values, min(k, values.shape[1]), sorted=True)
            ids = ids.gather(1, best)
        mean = rows @ self.centre.to(rows.dtype)
        return (values - mean[:, None]) * sign, ids


def _matrix(decoder: Decoder) -> torch.Tensor:
    """`[V, d]`."""
    weight, own = (getattr(decoder.unembedding, name, None) for name in ("weight", "W_U"))
    w = own.T if isinstance(own, torch.Tensor) and own.dim() == 2 else weight
    if not isinstance(w, torch.Tensor) or w.dim() != 2 or not w.is_floating_point() or w.is_meta:
        raise decoder.refusal(f"its unembedding is {decoder.unembedding}")
    return w.detach()


@torch.no_grad()
def find_readout(decoder: Decoder) -> Readout:
    """From a pass over 8 tokens.

    Raises:
        ValueError: for a model that makes its logits in another way.
    """
    head, w = decoder.unembedding, _matrix(decoder)
    assert head is not None
    seen: dict[torch.nn.Module, tuple[torch.Tensor, torch.Tensor]] = {}

    def keep(module: torch.nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        x = first_tensor(args, kwargs)
        if isinstance(x, torch.Tensor) and isinstance(returned(output), torch.Tensor):
            seen[module] = x, returned(output)

    ids = torch.arange(1, TOKENS + 1, device=w.device)[None] % len(w)
    with ExitStack() as stack:
        watch = Watch(decoder, None, [], stack)
        for module in dict.fromkeys((*decoder.beside, head)):
            stack.callback(module.register_forward_hook(keep, with_kwargs=True).remove)
        run(decoder, {"input_ids": ids})
        watch.check()
    reader = watch.reader
    if head not in seen or reader not in seen:
        raise decoder.refusal(f"hooks do not fire at the final norm or the unembedding; {NEVER}")
    read, made = seen[head]
    norm = None
    if reader is not head:
        assert reader is not None
        x, y = seen[reader]
        name = type(reader).__name__

        def refuse(reason: str) -> ValueError:
            return decoder.refusal(f"{name} is no norm of a known form, {reason}")

        norm = Norm(reader, form_of(reader, x, y, refuse))
        if not torch.equal(read, y):
            raise decoder.refusal(f"its unembedding reads something else than {name} returns")
    bias = next((getattr(head, n) for n in ("bias", "b_U") if hasattr(head, n)), None)
    acc = accumulate_dtype(w.dtype)
    expected = read.to(acc) @ w.T.to(acc)
    expected = expected if bias is None else expected + bias.detach()
    claims = Claims(None)
    claim = f"{type(head).__name__} must return what it reads times W_U + b"
    claims.equal(claim, made, expected, product_limit(read, w.T, bias, made))
    claims.check(decoder.refusal)
    centre = sum(part.to(acc).sum(0) for part in w.split(ROWS)) / len(w)
    assert isinstance(centre, torch.Tensor)
    return Readout(norm, w, centre)
