# SPDX-License-Identifier: Apache-2.0
"""Cross-layer transcoders (Ameisen et al., Circuit Tracing, Anthropic, 2025).

    codes_l = TopK(x_l w_enc[l]^T + b_enc[l])                        features of layer l read x_l
    y_m = b_dec[m] + sum over l <= m of codes_l w_dec[l][:, m - l]   and write to every layer m >= l

x and the target hold the layers side by side, `[L d_in]` and `[L d_out]`: what every MLP reads, and
what it writes. The decoder of layer l's features is a matrix `[F, (L - l) d_out]` of the layers
from l on; all of them lie in one flat parameter, without a hole and without a copy, and one gather
of a row serves all layers that it writes to. The loss is the sum over layers, in units where each
has a mean norm near sqrt(d).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import nn

from mikernels._dispatch import accumulate_dtype
from mikernels.nn import losses
from mikernels.nn.config import split_settings
from mikernels.nn.crosscoder import check_layers, layer_scales, scaled_layers
from mikernels.nn.entries import codes_of
from mikernels.nn.sae import SAE, Parts, SAEOutput, unit_rows
from mikernels.nn.terms import Term, Terms, Workspace
from mikernels.nn.topk_sae import TopKConfig
from mikernels.ops.sae.decode import sparse_decode
from mikernels.ops.sae.encode import topk_encode
from mikernels.values.batch import Batch, as_batch
from mikernels.values.codes import SparseCodes


@dataclass(frozen=True)
class CrossLayerTranscoderConfig(TopKConfig):
    """The settings of a CrossLayerTranscoder; see there."""

    n_layers: int = field(kw_only=True)
    d_out: int | None = field(default=None, kw_only=True)  # type: ignore[assignment]
    normalize_decoder: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        if self.d_out is None:
            object.__setattr__(self, "d_out", self.d)
        super().__post_init__()
        check_layers(self, self.n_layers, ("d", "d_out"))
        form = self.auxk
        if form.residual_gradient or form.bias != "none" or form.normaliser == "target":
            raise ValueError(
                f"{self.owner}: aux_form must be one of a layer's residual alone, got "
                f"{self.aux_form!r}; take 'mikernels', 'dictionary_learning' or 'saelens'"
            )
        if self.normalize_decoder:
            raise ValueError(
                f"{self.owner}: normalize_decoder must be False, got True; decoders of different "
                f"numbers of layers have no common norm"
            )

    @classmethod
    def title(cls) -> str:
        return "CrossLayerTranscoder"


class CrossLayerTranscoder(SAE):
    """A TopK cross-layer transcoder. It is trained on batches with a target.

    Args:
        d: width of all layers' inputs together. n_features: F, of every layer.
        k: active features per token and layer.
        n_layers: L. d_out: width of all layers' targets together; None is d.
        settings: as in SAE; k_aux counts per layer.

    Attributes:
        w_enc: `[L F, d / L]`. b_enc: `[L F]`. b_dec: `[d_out]`.
        w_dec: flat; `decoder(l)` is layer l's `[F, (L - l) d_out / L]`.
        layer_scale, target_scale: `[L]` float32 buffers, taken from the first batch.

    Codes have L F features: feature f of layer l is number l F + f.

    Raises:
        TypeError, ValueError: for settings outside those of SAE, by name; from `forward` and a
            Trainer for a batch without a target.

    Example:
        >>> clt = CrossLayerTranscoder(3 * 64, 512, 8, n_layers=3)
        >>> mlp_inputs, mlp_outputs = torch.randn(2, 10, 3 * 64)
        >>> clt(Batch(mlp_inputs, mlp_outputs)).reconstruction.shape
        torch.Size([10, 192])
    """

    architecture: ClassVar[str] = "cross_layer_transcoder"
    config_type: ClassVar[Any] = CrossLayerTranscoderConfig
    centred: ClassVar[bool] = False
    needs_target: ClassVar[bool] = True
    config: CrossLayerTranscoderConfig
    layer_scale: torch.Tensor
    target_scale: torch.Tensor

    def __init__(self, d: int, n_features: int, k: int, **settings: Any):
        form = CrossLayerTranscoderConfig
        config, more = split_settings(form, settings)
        if "n_layers" not in config:
            raise TypeError("CrossLayerTranscoder: n_layers must be given, got none; pass n_layers")
        super().__init__(form(d, n_features, k=k, **config), **more)
        for name in ("layer_scale", "target_scale"):
            self.register_buffer(name, torch.ones(self.config.n_layers, dtype=torch.float32))

    def _make_weights(
        self, dtype: torch.dtype, generator: torch.Generator | None, encoder_scale: float
    ) -> None:
        shapes = self.tensors(self.config)
        total, d = shapes["w_enc"][0]
        self.w_dec = nn.Parameter(torch.zeros(shapes["w_dec"][0], dtype=dtype))
        self.w_enc = nn.Parameter(unit_rows(total, d, dtype, generator) * encoder_scale)
        self.b_enc = nn.Parameter(torch.zeros(total, dtype=dtype))
        self.b_dec = nn.Parameter(torch.zeros(shapes["b_dec"][0], dtype=dtype))

    @classmethod
    def tensors(cls, config: Any) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
        count, f = config.n_layers, config.n_features
        pairs = count * (count + 1) // 2
        return {
            "w_enc": ((count * f, config.d // count), None),
            "w_dec": ((pairs * f * (config.d_out // count),), None),
            "b_enc": ((count * f,), None),
            "b_dec": ((config.d_out,), None),
            "tokens_since_fired": ((count * f,), torch.int64),
            "layer_scale": ((count,), torch.float32),
            "target_scale": ((count,), torch.float32),
        }

    @property
    def _out(self) -> int:
        return self.config.d_out // self.config.n_layers  # type: ignore[operator]

    def rows(self, name: str, t: torch.Tensor, part: int) -> torch.Tensor:
        count, f = self.config.n_layers, self.config.n_features
        if name != "w_dec":
            return t[part * f : (part + 1) * f]
        first = part * count - part * (part - 1) // 2
        pairs = count - part
        here = t[first * f * self._out : (first + pairs) * f * self._out]
        return here.view(f, pairs * self._out)

    def decoder(self, layer: int) -> torch.Tensor:
        """`[F, (L - layer) d_out / L]`: what a layer's features write, from that layer on."""
        return self.rows("w_dec", self.w_dec, layer)

    def _input_of(self, x: torch.Tensor, layer: int) -> torch.Tensor:
        d = self.config.d // self.config.n_layers
        return x[..., layer * d : (layer + 1) * d]

    def _encode_layer(self, x: torch.Tensor, k: int | None, layer: int) -> SparseCodes:
        return topk_encode(
            self._input_of(x, layer).to(self.w_enc.dtype),
            self.rows("w_enc", self.w_enc, layer),
            self.rows("b_enc", self.b_enc, layer),
            k=self.config.k if k is None else k,
        )

    def _together(self, parts: list[SparseCodes]) -> SparseCodes:
        values = torch.cat([c.values for c in parts], -1)
        f = self.config.n_features
        indices = torch.cat([c.indices + layer * f for layer, c in enumerate(parts)], -1)
        return SparseCodes._trusted(values, indices, len(parts) * f)

    def _apart(self, codes: SparseCodes) -> list[SparseCodes]:
        """The codes of every layer, whose indices count within it; slots lie layer by layer."""
        count, f = self.config.n_layers, self.config.n_features
        slots = codes.values.shape[-1] // count
        if codes.is_ragged or slots * count != codes.values.shape[-1]:
            raise ValueError(
                f"{self.name}: codes must have {count} times the slots of a layer, as encode makes "
                f"them, got {list(codes.values.shape)}"
            )
        values, indices = codes.values.split(slots, -1), codes.indices.split(slots, -1)
        return [
            SparseCodes(v, i - layer * f, f)
            for layer, (v, i) in enumerate(zip(values, indices, strict=True))
        ]

    def encode(self, x: torch.Tensor, k: int | None = None) -> SparseCodes:
        """The k best features of every layer and token of x `[..., d]`, `[..., L k]` slots.

        Raises:
            TypeError, ValueError: for an x that is not floating `[..., d]`, or k outside 1..F.
        """
        self._check(x)
        return self.slots(scaled_layers(x, self.layer_scale), k)

    def slots(self, x: torch.Tensor, k: int | None = None) -> SparseCodes:
        layers = range(self.config.n_layers)
        return self._together([self._encode_layer(x, k, layer) for layer in layers])

    def _decode_parts(self, parts: list[SparseCodes]) -> torch.Tensor:
        leading = parts[0].values.shape[:-1]
        y = self.b_dec.expand(*leading, -1)
        acc = accumulate_dtype(y.dtype)
        y = y.to(acc, copy=True)
        for layer, codes in enumerate(parts):
            y[..., layer * self._out :] += sparse_decode(codes, self.decoder(layer))
        return y.to(self.w_dec.dtype)

    def output(self, codes: SparseCodes) -> torch.Tensor:
        return self._decode_parts(self._apart(codes))

    def decode(self, codes: SparseCodes) -> torch.Tensor:
        return scaled_layers(self.output(codes), 1 / self.target_scale)

    def in_units(self, batch: Batch) -> Batch:
        target = None if batch.target is None else scaled_layers(batch.target, self.target_scale)
        return replace(batch, input=scaled_layers(batch.input, self.layer_scale), target=target)

    def forward(self, x: torch.Tensor | Batch, k: Any = None) -> SAEOutput:
        out = self.run(self.in_units(as_batch(x)), k)
        raw = scaled_layers(out.reconstruction, 1 / self.target_scale)
        return out._replace(reconstruction=raw)

    def run(
        self, batch: Batch, k: Any, dead: torch.Tensor | None = None, clock: Parts | None = None
    ) -> SAEOutput:
        if self.training:
            return super().run(batch, k, dead, clock)
        self._check_target(batch)
        codes = self.slots(batch.input, k)
        return self.score(batch, codes, self.output(codes), dead)

    def layer_fvu(self, batch: Batch) -> torch.Tensor:
        """`[L]`: the fraction of variance unexplained of every layer's target."""
        units = self.in_units(batch)
        assert units.target is not None
        with torch.no_grad():
            error = self.output(self.slots(units.input)).float() - units.target.float()
            centred = units.target.float() - units.target.float().mean(0)
            parts = (t.reshape(len(t), self.config.n_layers, -1) for t in (error, centred))
            left, whole = (p.square().sum((0, 2)) for p in parts)
        return left * losses.reciprocal(whole)

    def _dead_of(self, dead: torch.Tensor, layer: int) -> torch.Tensor:
        f = self.config.n_features
        return dead[(dead >= layer * f) & (dead < (layer + 1) * f)] - layer * f

    def _aux(self, batch: Batch, dead: torch.Tensor, errors: list[torch.Tensor]) -> torch.Tensor:
        error = errors[-1]
        measure = self.measure(batch, batch.output.to(error.dtype))
        total = torch.zeros((), dtype=error.dtype, device=error.device)
        for layer in range(self.config.n_layers):
            features = self._dead_of(dead, layer)
            if not features.numel():
                continue
            inner = self._aux_codes_of(batch.input, features, layer)
            revived = sparse_decode(inner, self.decoder(layer).index_select(0, features))
            e = error[:, layer * self._out :]
            revived = revived.to(error.dtype)
            total = total + self._aux_loss(batch, revived, e, features.numel(), measure)
        return total

    def _aux_codes_of(self, x: torch.Tensor, dead: torch.Tensor, layer: int) -> SparseCodes:
        assert self.config.k_aux is not None
        return topk_encode(
            self._input_of(x, layer).to(self.w_enc.dtype),
            self.rows("w_enc", self.w_enc, layer).index_select(0, dead),
            self.rows("b_enc", self.b_enc, layer).index_select(0, dead),
            k=min(self.config.k_aux, dead.numel()),
        )

    def dense_run(self, batch: Batch, k: Any, dead: torch.Tensor, clock: Parts) -> SAEOutput:
        layers = range(self.config.n_layers)
        k = self.config.k if k is None else k
        hs, all_acts = [], []
        with clock.part("encode"):
            for layer in layers:
                w_enc = self.rows("w_enc", self.w_enc, layer)
                b_enc = self.rows("b_enc", self.b_enc, layer)
                h = torch.addmm(b_enc, self._input_of(batch.input, layer), w_enc.T)
                best = h.relu().topk(k, dim=-1, sorted=False)
                hs.append(h)
                all_acts.append(torch.zeros_like(h).scatter(-1, best.indices, best.values))
        with clock.part("decode"):
            # what each layer gets from the layers up to it
            columns = [batch.output.new_zeros(len(batch), self._out) for _ in layers]
            for source in layers:
                written = (all_acts[source] @ self.decoder(source)).split(self._out, -1)
                for layer, part in enumerate(written, start=source):
                    columns[layer] = columns[layer] + part
            y = torch.cat(columns, -1) + self.b_dec
        error = y - batch.output
        aux = None
        if dead.numel() and self.config.aux_coefficient:
            aux = torch.zeros_like(error[0, 0])
            measure = self.measure(batch, batch.output)
            for layer in layers:
                features = self._dead_of(dead, layer)
                if not features.numel():
                    continue
                alone = hs[layer].index_select(1, features)
                count = min(int(self.config.k_aux or 1), features.numel())
                best = alone.relu().topk(count, sorted=False)
                some = torch.zeros_like(alone).scatter(-1, best.indices, best.values)
                revived = some @ self.decoder(layer).index_select(0, features)
                e = error[:, layer * self._out :]
                aux = aux + self._aux_loss(batch, revived, e, features.numel(), measure)
        codes = codes_of(torch.cat(all_acts, -1))
        return self._sum(batch, y, codes, [error], aux, None)

    @torch.no_grad()
    def terms(
        self,
        batch: Batch,
        k: Any,
        dead: torch.Tensor | None,
        share: float | torch.Tensor,
        work: Workspace,
        slots: SparseCodes | None = None,
    ) -> Terms:
        layers = range(self.config.n_layers)
        acc = batch.output.dtype
        with work.part("encode"):
            if slots is None:
                parts = [self._encode_layer(batch.input, k, layer) for layer in layers]
                codes = self._together(parts)
            else:
                codes, parts = slots, self._apart(slots)
        with work.part("decode"):
            error = work.buffer("error", batch.output.shape, batch.output)
            torch.sub(self.b_dec.to(acc), batch.output, out=error)
            for layer in layers:
                y = sparse_decode(parts[layer], self.decoder(layer))
                error[:, layer * self._out :] += y
            squares = losses.squares(error)
        rows = work.buffer("rows", batch.output.shape, batch.output)
        measure = losses.Measure(batch.count, losses.spread(batch.output, batch.weights, out=rows))
        total = losses.weighted(squares, batch.weights)
        values = {"mse": losses.mse(total, measure), "fvu": losses.fvu(total, measure)}
        loss, aux_loss = values[self.config.loss], torch.zeros_like(total)
        x = batch.input.to(self.w_enc.dtype).to(acc)
        found: list[Term] = []
        if dead is not None and dead.numel() and self.config.aux_coefficient:
            for layer in layers:
                features = self._dead_of(dead, layer)
                if not features.numel():
                    continue
                some, term = self._aux_part(batch, features, error, measure, share, x, layer, work)
                aux_loss = aux_loss + some
                found.append(term)
            loss = loss + self.config.aux_coefficient * aux_loss
        factor = share * (2 * losses.per_square(self.config.loss, measure))
        dy = error.mul_(factor if batch.weights is None else (factor * batch.weights)[:, None])
        main = [
            Term(parts[layer], dy[:, layer * self._out :], self._input_of(x, layer), part=layer)
            for layer in layers
        ]
        values |= {"loss": loss, "aux_loss": aux_loss, "sparsity": torch.zeros_like(aux_loss)}
        return Terms(codes, [*main, *found], {"b_dec": dy.sum(0)}, values)

    def _aux_part(
        self,
        batch: Batch,
        features: torch.Tensor,
        error: torch.Tensor,
        measure: losses.Measure,
        share: float | torch.Tensor,
        x: torch.Tensor,
        layer: int,
        work: Workspace,
    ) -> tuple[torch.Tensor, Term]:
        with work.part("encode"):
            inner = self._aux_codes_of(batch.input, features, layer)
            outer = SparseCodes._trusted(
                inner.values, features[inner.indices], self.config.n_features
            )
        residual = error[:, layer * self._out :]
        with work.part("decode"):
            revived = sparse_decode(outer, self.decoder(layer)).to(error.dtype)
        own = self._input_of(x, layer)
        term, aux = self._aux_gradient(
            batch, outer, revived, residual, features, measure, share, own
        )
        return aux.loss, term._replace(part=layer)

    @torch.no_grad()
    def prepare_(self, batch: Batch, init_b_dec: bool) -> None:
        fresh = bool((self.layer_scale == 1).all()) and not self.b_dec.any()
        if fresh and batch.target is not None:
            count = self.config.n_layers
            self.layer_scale.copy_(layer_scales(batch.input, count))
            self.target_scale.copy_(layer_scales(batch.target, count))
        super().prepare_(self.in_units(batch), init_b_dec)
