# SPDX-License-Identifier: Apache-2.0
"""The variants that the demo trains side by side: what each is, and its settings for a short run.

All of them aim at k active features a token. Settings that are means over thousands of steps
elsewhere are shortened here, since a run of the demo has a few hundred.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mikernels.demo.options import DemoOptions
from mikernels.nn.matryoshka_sae import default_widths


@dataclass(frozen=True)
class Variant:
    """A row of the comparison.

    Attributes:
        architecture: of `mikernels.nn.ARCHITECTURES`. folder: of its run.
        title: for people. source: its paper. idea: what it does, after its title.
    """

    architecture: str
    folder: str
    title: str
    source: str
    idea: str


VARIANTS = (
    Variant(
        "topk",
        "fused",
        "TopK",
        "Gao et al., arXiv 2406.04093",
        "keeps the k strongest features of every token.",
    ),
    Variant(
        "batch_topk",
        "batch_topk",
        "BatchTopK",
        "Bussmann et al., arXiv 2412.06410",
        "keeps k a token on average over a batch, and in use all that pass one threshold.",
    ),
    Variant(
        "matryoshka",
        "matryoshka",
        "Matryoshka",
        "Bussmann et al., arXiv 2503.17547",
        "is BatchTopK whose first features must reconstruct by themselves, on several levels; FVU "
        "is that of the last level, of all features.",
    ),
    Variant(
        "jumprelu",
        "jumprelu",
        "JumpReLU",
        "Rajamanoharan et al., arXiv 2407.14435, with the quadratic penalty of Gemma Scope 2",
        "learns a threshold for every feature, and is drawn to k by its loss alone. It starts with "
        "a ninth of the features active, so its first steps need the most memory.",
    ),
    Variant(
        "lista_matryoshka",
        "lista_matryoshka",
        "LISTA-Matryoshka",
        "Chanin, Letting Claude do autonomous research to improve SAEs; LISTA by Gregor and LeCun",
        "encodes a second time what its first codes leave, with levels by how often features fire.",
    ),
)
TOPK, OTHERS = VARIANTS[0], VARIANTS[1:]


def sae_settings(architecture: str, options: DemoOptions, n_features: int) -> dict[str, Any]:
    """Keyword arguments of the variant's constructor, beside d."""
    settings: dict[str, Any] = {
        "n_features": n_features,
        # of the fused run for the plain one too, or AuxK would set in at different steps
        "dead_after": max(1, options.config.total_tokens // 6),
    }
    if architecture == "jumprelu":
        # L0 falls far in the first steps, after which thresholds move by a learning rate a step:
        # from the default start, 4 k, a short run does not come back. On SmolLM2's layer 14
        # (F 9216, k 32, 180 steps, bandwidth 1) this start ends at an L0 of 28 with 17 % dead
        # features, 4 k at 14 with 23 %
        start = max(options.k, n_features / 9)
        return {**settings, "target_l0": options.k, "initial_l0": start, "bandwidth": 1.0}
    settings["k"] = options.k
    if "matryoshka" in architecture:
        widths = [width for width in default_widths(n_features) if width >= options.k]
        settings["widths"] = widths
    return settings
