# SPDX-License-Identifier: Apache-2.0
"""What features write, as directions: which others write the same, and which tokens they speak for.

Both are made of some features at a time, exactly, and neither forms a matrix of F x F or of
F x vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from mikernels.circuits.features.readout import find_readout
from mikernels.models.decoder import find_decoder
from mikernels.models.hooks import original
from mikernels.nn import SAE, Crosscoder, CrossLayerTranscoder
from mikernels.ops.sae.encode import topk_encode

NAME = "collect_features"
FIX = "leave model out"
Scored = list[tuple[str, float]]


class Similar:
    """The features whose decoder rows have the largest cosine with a feature's.

        cos(f, g) = w_dec[f] . w_dec[g] / (|w_dec[f]| |w_dec[g]|)

    Of a crosscoder over all its layers at once; of a cross-layer transcoder among the features of a
    layer, since those of others write to other layers. A row of zeros is similar to none.

    Args:
        n: how many of each, fewer of fewer features.
    """

    def __init__(self, sae: SAE, n: int):
        self._rows = _matrices(sae)
        self._n = n
        self._scales = []
        for rows in self._rows:
            norms = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32)
            self._scales.append((1 / norms).masked_fill(norms == 0, 0))

    def of(self, start: int, stop: int) -> list[list[tuple[int, float]]]:
        """Of features start..stop-1: (feature, cosine), largest first, ties by number."""
        found: list[list[tuple[int, float]]] = []
        first = 0
        for rows, scale in zip(self._rows, self._scales, strict=True):
            low, high = max(start - first, 0), min(stop - first, len(rows))
            if low < high:
                found += self._within(rows, scale, low, high, first)
            first += len(rows)
        return found

    def _within(
        self, rows: torch.Tensor, scale: torch.Tensor, low: int, high: int, first: int
    ) -> list[list[tuple[int, float]]]:
        x = rows[low:high] * scale[low:high, None].to(rows.dtype)
        # one more: the feature itself
        k = min(self._n + 1, len(rows))
        codes = topk_encode(x, rows, k=k, scale=scale.to(rows.dtype), relu=False)
        cosines = codes.values.float() * scale[codes.indices]
        itself = codes.indices == torch.arange(low, high, device=x.device)[:, None]
        usable = ~itself & (scale[codes.indices] > 0) & (scale[low:high, None] > 0)
        # indices ascend, so that a stable sort keeps ties in their order
        cosines, order = cosines.where(usable, -torch.inf).sort(descending=True, stable=True)
        numbers = codes.indices.gather(1, order) + first
        left = usable.sum(1).clamp(max=self._n).tolist()
        return [
            list(zip(ids[:n], values[:n], strict=True))
            for ids, values, n in zip(numbers.tolist(), cosines.tolist(), left, strict=True)
        ]


def _matrices(sae: SAE) -> list[torch.Tensor]:
    """Decoder rows by feature, in parts that are of one space."""
    if isinstance(sae, CrossLayerTranscoder):
        return [sae.decoder(layer).detach() for layer in range(sae.config.n_layers)]
    return [sae.w_dec.detach()]


class Spoken:
    """The tokens that features promote and suppress, as `mikernels.circuits.logit_lens` has them.

    Of a crosscoder, what a feature writes to the last of its layers; of a cross-layer transcoder,
    what it writes to all layers together: each in the unit of the activations.

    Args:
        n: how many of each. text: of a token id.

    Raises:
        ValueError: features write to another width than the model's; a model that makes its logits
            in another way than by a norm and a matrix.
    """

    def __init__(self, sae: SAE, model: torch.nn.Module, n: int, text: Callable[[int], str]):
        decoder = find_decoder(original(model), NAME, FIX)
        decoder.check_eval()
        self._sae, self._text = sae, text
        width = self._directions(0, 1).shape[1]
        if width != decoder.d:
            raise ValueError(
                f"{NAME}: model must be of the width that features of sae write to, {width}, got "
                f"one of {decoder.d}; leave it out"
            )
        self._readout = find_readout(decoder)
        self._n = min(n, len(self._readout.w_u))

    def _directions(self, start: int, stop: int) -> torch.Tensor:
        """`[stop - start, d]`."""
        sae = self._sae
        if isinstance(sae, Crosscoder):
            width = sae.config.d // sae.config.n_layers
            return sae.w_dec.detach()[start:stop, -width:] / sae.layer_scale[-1]
        if not isinstance(sae, CrossLayerTranscoder):
            return sae.w_dec.detach()[start:stop]
        parts = []
        f = sae.config.n_features
        for layer in range(sae.config.n_layers):
            low, high = max(start - layer * f, 0), min(stop - layer * f, f)
            if low < high:
                scale = sae.target_scale[layer:]
                rows = sae.decoder(layer).detach()[low:high]
                written = rows.float().reshape(high - low, len(scale), -1) / scale[:, None]
                parts.append(written.sum(1))
        return torch.cat(parts)

    def of(self, start: int, stop: int) -> list[tuple[Scored, Scored]]:
        """Of features start..stop-1 what each promotes and suppresses, strongest first."""
        directions = self._directions(start, stop)
        promoted, suppressed = (self._readout.top(directions, self._n, sign) for sign in (1, -1))
        return list(zip(self._named(*promoted), self._named(*suppressed), strict=True))

    def _named(self, scores: torch.Tensor, ids: torch.Tensor) -> list[Scored]:
        return [
            [(self._text(token), score) for token, score in zip(*row, strict=True)]
            for row in zip(ids.tolist(), scores.tolist(), strict=True)
        ]
