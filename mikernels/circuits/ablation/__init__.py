# SPDX-License-Identifier: Apache-2.0
"""Causal tests: a model with some of its components replaced."""

from mikernels.circuits.ablation.context import Ablation, ablate
from mikernels.circuits.ablation.effect import AblationEffect, ablation_effect
from mikernels.circuits.ablation.erasure import Erasure, comprehensiveness, sufficiency

__all__ = [
    "Ablation",
    "AblationEffect",
    "Erasure",
    "ablate",
    "ablation_effect",
    "comprehensiveness",
    "sufficiency",
]
