# SPDX-License-Identifier: Apache-2.0
"""Virtual weights: which features read what others write, from the weights alone.

For a feature u that writes into the residual stream and a feature v that reads it later

    E[u, v] = <N(W_dec[u]), W_enc[v]>

with N the norm before the MLP that v reads the input of (gain, and the mean taken off; not its
scale, one positive number for each token), or nothing where v reads the stream itself (Ameisen et
al., "Circuit Tracing", Anthropic, 2025). Products with a selection at their end
(`mikernels.feature_edges`): no F x F matrix is formed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from mikernels._dispatch import accumulate_dtype
from mikernels.circuits.features.dictionaries import Dictionary, SAEs, order, read_dictionaries
from mikernels.circuits.features.readout import through
from mikernels.models.decoder import find_decoder
from mikernels.models.hooks import original
from mikernels.models.readers import Norm, wire
from mikernels.ops.pairs.feature_edges import feature_edges
from mikernels.ops.pairs.pairwise_topk import check_selection

NAME = "virtual_edges"
FIX = "give the matrices to mikernels.feature_edges"


class VirtualEdge(NamedTuple):
    """One edge: names as `14.mlp_out.f123`; the weight is of the target's pre-activation by the
    source's activation, times the norm's scale where there is one."""

    source: str
    target: str
    weight: float


def _joined(source: Dictionary, target: Dictionary) -> bool:
    """Whether the stream carries what one writes to what the other reads."""
    into = source.writes[0].place != "mlp_in"
    return (
        into
        and target.reads[0].place in ("residual", "mlp_in")
        and order(source.writes[0]) < order(target.reads[0])
    )


@torch.inference_mode(False)
@torch.no_grad()
def virtual_edges(
    model: torch.nn.Module, saes: SAEs, *, k: int = 30, by: str = "abs"
) -> list[VirtualEdge]:
    """The strongest direct edges between features of different sites.

    Args:
        model: a Hugging Face causal language model in eval mode, or a HookedTransformer.
        saes: as for `feature_circuit`, each at one site. Those at attn_out and mlp_out write into
            the stream and read none of it.
        k: edges. by: "abs", or "value", largest first.

    Returns:
        The edges, strongest first; of equals those of earlier sites.

    Raises:
        TypeError, ValueError: as `feature_graph`; where no site comes before another.

    Example:
        >>> edges = circuits.virtual_edges(model, {"0.mlp_out": sae, "1.residual": sae}, k=5)
        >>> len(edges)
        5
    """
    check_selection(NAME, k, by, None)
    decoder = find_decoder(original(model), NAME, FIX)
    decoder.check_eval()
    found = read_dictionaries(NAME, saes, decoder)
    if wide := [one for one in found if len(one.writes) > 1]:
        raise ValueError(f"{NAME}: saes must be of one site each, got a {wide[0].sae.name}")
    pairs = [(u, v) for u in found for v in found if _joined(u, v)]
    if not pairs:
        raise ValueError(
            f"{NAME}: saes must be at a site that is written and at one that is read later "
            f"(residual or mlp_in), got {[str(one.writes[0]) for one in found]}"
        )
    layers = wire(decoder).layers
    edges: list[tuple[float, int, VirtualEdge]] = []
    for u, v in pairs:
        site = v.reads[0]
        norm: Norm | None = layers[site.layer].mlp_norm if site.place == "mlp_in" else None
        acc = accumulate_dtype(torch.promote_types(u.dtype, v.dtype))
        written = through(norm, u.sae.w_dec.detach().to(v.device, acc))
        best = feature_edges(written, v.sae.w_enc.detach().to(acc), k=k, by=by)
        for i, j, weight in zip(
            best.rows.tolist(), best.cols.tolist(), best.values.tolist(), strict=True
        ):
            edge = VirtualEdge(f"{u.writes[0]}.f{i}", f"{v.writes[0]}.f{j}", weight)
            edges.append((-abs(weight) if by == "abs" else -weight, len(edges), edge))
    return [edge for _, _, edge in sorted(edges, key=lambda one: one[:2])[:k]]
