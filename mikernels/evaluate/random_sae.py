# SPDX-License-Identifier: Apache-2.0
"""The SAE that has learned nothing: what any number of a trained one is to be compared with."""

from __future__ import annotations

import torch

from mikernels.evaluate.judged import Judged, reconstructed
from mikernels.nn import SAE, TopKSAE
from mikernels.values.batch import Batch


@torch.no_grad()
def random_like(sae: Judged, rows: torch.Tensor, mean: torch.Tensor, seed: int = 0) -> SAE:
    """An SAE like another as it was before training, but for its decoder bias, the mean.

    Of ours: the same class and settings (F, k), and what the class keeps of a batch in training,
    such as the threshold of a BatchTopKSAE, from `rows`. Of others: a TopKSAE of as many features,
    with the k that `sae` has on `rows` on average.

    Args:
        sae: of `mikernels.nn`, or of another library, see `as_judged`.
        rows: `[n, d]` activations, some thousands.
        mean: `[d]`, of the activations.
        seed: of its features.
    """
    generator = torch.Generator().manual_seed(seed)
    if isinstance(sae, SAE):
        twin = type(sae).of(sae.config, dtype=sae.w_dec.dtype, generator=generator)
        twin = twin.to(sae.w_dec.device)
    else:
        active = features = 0
        for _, codes, _ in reconstructed("random_like", sae, Batch(rows), len(rows)):
            active, features = active + int(codes.l0().sum()), codes.n_features
        k = max(1, round(active / len(rows)))
        twin = TopKSAE(rows.shape[1], features, k, generator=generator).to(rows.device)
    twin.b_dec.copy_(mean)
    twin.track_(twin.select(rows.to(twin.w_dec.device)))
    return twin.eval()
