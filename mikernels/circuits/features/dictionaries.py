# SPDX-License-Identifier: Apache-2.0
"""SAEs at their places in a model: which sites they read, and what they write at which.

| `saes` | reads | writes |
|---|---|---|
| `{"20.residual": sae}` | the site | the site |
| `{"14.mlp_out": transcoder}` | 14.mlp_in | 14.mlp_out |
| `{("3.residual", "5.residual"): crosscoder}` | all its sites | all its sites |
| `{("0.mlp_out", "1.mlp_out"): clt}`, a cross-layer transcoder | 0.mlp_in, 1.mlp_in | its sites |

At every site that is written

    x = sum_f a_f W[f] + b (+ skip) + eps

with W the decoder's rows there, `skip` the linear connection of a skip transcoder, and eps, the
error node, all that the dictionary does not say (Marks et al., arXiv 2403.19647).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

from mikernels._dispatch import accumulate_dtype
from mikernels.models.parts import Decoder
from mikernels.models.sites import AnySite, Site, read_sites
from mikernels.nn import SAE, Crosscoder, CrossLayerTranscoder
from mikernels.values.codes import SparseCodes

SAEs = Mapping[AnySite | tuple[AnySite, ...], SAE]
FORM = (
    "a mapping of sites to SAEs such as {'14.mlp_out': sae, '20.residual': sae}, with a tuple of "
    "sites for a Crosscoder or CrossLayerTranscoder"
)


class Rows(NamedTuple):
    """Features first, first + 1, ... write `scale w[i]`, w `[F, d]`."""

    first: int
    w: torch.Tensor
    scale: float


class Slots(NamedTuple):
    """Active features, by token, then by feature: `[n]` each."""

    tokens: torch.Tensor
    features: torch.Tensor
    values: torch.Tensor


def slots_of(codes: SparseCodes) -> Slots:
    """What is not 0 in codes of `[T, d]`; differentiable in the values."""
    values, indices = codes.flat()
    tokens = codes.tokens
    if tokens is None:
        tokens = torch.arange(len(values), device=values.device)
        tokens = tokens[:, None].expand_as(indices).reshape(-1)
    values, indices = values.reshape(-1), indices.reshape(-1)
    active = (values.detach() != 0).nonzero()[:, 0]
    order = active[(tokens[active] * codes.n_features + indices[active]).argsort()]
    return Slots(tokens[order], indices[order], values[order])


class Dictionary:
    """An SAE at its sites.

    Attributes:
        sae: as given. reads, writes: its sites. n_features: of its codes.
    """

    def __init__(self, sae: SAE, reads: tuple[Site, ...], writes: tuple[Site, ...]):
        self.sae, self.reads, self.writes = sae, reads, writes
        self.n_features = int(sae.b_enc.shape[0])
        self._norms: dict[int, torch.Tensor] = {}

    @property
    def device(self) -> torch.device:
        return self.sae.b_dec.device

    @property
    def dtype(self) -> torch.dtype:
        return self.sae.b_dec.dtype

    def input(self, x: Mapping[Site, torch.Tensor]) -> torch.Tensor:
        """What it reads of the sites' `[T, d]`: side by side."""
        return torch.cat([x[site].to(self.device) for site in self.reads], -1)

    def split(self, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What it makes `[T, L d]`, for each site that it writes."""
        return y.split(y.shape[-1] // len(self.writes), -1)

    def rows(self, site: int) -> list[Rows]:
        """What features write at the site of that number, in the order of the features."""
        sae = self.sae
        if isinstance(sae, CrossLayerTranscoder):
            scale, f = 1 / float(sae.target_scale[site]), sae.config.n_features
            own = [self.split_rows(sae.decoder(n), site - n) for n in range(site + 1)]
            return [Rows(n * f, w, scale) for n, w in enumerate(own)]
        if isinstance(sae, Crosscoder):
            w = self.split_rows(sae.w_dec, site)
            return [Rows(0, w, 1 / float(sae.layer_scale[site]))]
        return [Rows(0, sae.w_dec.detach(), 1.0)]

    def split_rows(self, w: torch.Tensor, number: int) -> torch.Tensor:
        """`[F, d]`: of rows of several sites side by side, those of one; a view."""
        d = int(self.sae.b_dec.shape[0]) // len(self.writes)
        return w.detach()[:, number * d : (number + 1) * d]

    def norms(self, site: int) -> torch.Tensor:
        """`[F]` of the rows, 0 for features that do not write there."""
        if site not in self._norms:
            acc = accumulate_dtype(self.dtype)
            found = torch.zeros(self.n_features, dtype=acc, device=self.device)
            for first, w, scale in self.rows(site):
                norms = torch.linalg.vector_norm(w, dim=1, dtype=acc)
                found[first : first + len(w)] = norms * scale
            self._norms[site] = found
        return self._norms[site]


def _several(where: str, names: str, sae: SAE, sites: tuple[Site, ...], decoder: Decoder) -> None:
    """A key of as many sites as the SAE has layers."""
    layers = getattr(sae.config, "n_layers", 1)
    if len(sites) != layers:
        raise ValueError(
            f"{where}: saes must name {layers} sites for a {sae.name} of {layers} layers, got "
            f"{names}; {'a tuple of them, in order' if layers > 1 else 'one site each'}"
        )
    d = decoder.d * layers
    widths = int(sae.config.d), int(sae.config.d_out or sae.config.d)
    if widths != (d, d):
        raise ValueError(
            f"{where}: saes must have the model's width at {names}, {d}, got "
            f"{widths[0] if widths[0] != d else widths[1]} of {sae.name}; it is of another model"
        )


def read_dictionaries(where: str, saes: SAEs, decoder: Decoder) -> list[Dictionary]:
    """The SAEs by the site that they write first, in the order of the model.

    Args:
        where: of messages: the public function.

    Raises:
        TypeError: another form, another object than an SAE of mikernels.nn.
        ValueError: sites that the model does not have, or of another kind than the SAE's; a site
            that two SAEs write; another width.
    """
    if not isinstance(saes, Mapping):
        raise TypeError(f"{where}: saes must be {FORM}, got {type(saes).__name__}")
    if not saes:
        raise ValueError(f"{where}: saes must be {FORM}, got none")
    found = []
    for key, sae in saes.items():
        sites = read_sites(where, "saes", list(key) if isinstance(key, tuple) else key)
        names = ", ".join(map(str, sites))
        if not isinstance(sae, SAE):
            raise TypeError(
                f"{where}: saes must hold SAEs of mikernels.nn, got {type(sae).__name__} at "
                f"{names}; load one of SAELens with mikernels.integrations.saelens.load_sae"
            )
        writes = tuple(_known(where, site, decoder) for site in sites)
        _several(where, names, sae, writes, decoder)
        reads = writes
        if sae.needs_target:
            if other := [site for site in writes if site.place != "mlp_out"]:
                raise ValueError(
                    f"{where}: saes must name where a {sae.name} writes, NUMBER.mlp_out (it reads "
                    f"NUMBER.mlp_in), got {other[0]}"
                )
            reads = tuple(Site(site.layer, "mlp_in") for site in writes)
        found.append(Dictionary(sae, reads, writes))
    all_sites = [site for one in found for site in one.writes]
    if twice := next((site for site in all_sites if all_sites.count(site) > 1), None):
        raise ValueError(f"{where}: saes must have one SAE for each site, got {twice} again")
    return sorted(found, key=lambda one: order(one.writes[0]))


def order(site: Site) -> tuple[int, int]:
    """Of sites in the model; attention and MLP of a parallel block are neither before the other."""
    return site.layer, ("attn_out", "mlp_in", "mlp_out", "residual").index(site.place)


def _known(where: str, site: Site | str, decoder: Decoder) -> Site:
    if isinstance(site, str):
        raise ValueError(
            f"{where}: saes must be at sites such as '14.mlp_out' or '20.residual', got {site!r}"
        )
    if not 0 <= site.layer < len(decoder.blocks):
        raise ValueError(
            f"{where}: saes must be at layers 0..{len(decoder.blocks) - 1}, got {site}"
        )
    if site.place.startswith("mlp") and decoder.blocks[site.layer].mlp is None:
        raise ValueError(
            f"{where}: saes must be at sites that the model has, got {site}, of a block without "
            f"an MLP"
        )
    return site
