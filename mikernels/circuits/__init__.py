# SPDX-License-Identifier: Apache-2.0
"""From a model to the components that act together: gradients, their interactions, circuits."""

from mikernels.circuits.components import gradient_components, split_heads
from mikernels.circuits.composition import composition_scores
from mikernels.circuits.interactions import (
    GradientInteractions,
    NamedInteractions,
    compute_gradient_interactions,
    select_top_k,
)
from mikernels.circuits.interpret import CircuitEdge, Circuits, interpret_circuits
from mikernels.models.rules import PRESETS, Effect, RuleReport, Rules, rules

__all__ = [
    "PRESETS",
    "CircuitEdge",
    "Circuits",
    "Effect",
    "GradientInteractions",
    "NamedInteractions",
    "RuleReport",
    "Rules",
    "composition_scores",
    "compute_gradient_interactions",
    "gradient_components",
    "interpret_circuits",
    "rules",
    "select_top_k",
    "split_heads",
]
