# SPDX-License-Identifier: Apache-2.0
"""Which parts of a model an answer rests on: gradients under rules, interactions, circuits."""

from mikernels.circuits import tasks
from mikernels.circuits.ablation import (
    AblationEffect,
    Erasure,
    ablate,
    ablation_effect,
    comprehensiveness,
    sufficiency,
)
from mikernels.circuits.attribution import TokenAttribution, attribute
from mikernels.circuits.circuit import Circuit, Selection
from mikernels.circuits.components import gradient_components, split_heads
from mikernels.circuits.composition import composition_scores
from mikernels.circuits.faithfulness import Curve, faithfulness_curve, random_circuit
from mikernels.circuits.features import (
    Coactivation,
    FeatureCircuit,
    FeatureGraph,
    HeadCircuit,
    LogitLens,
    coactivation,
    feature_circuit,
    feature_graph,
    logit_lens,
    neuron_activations,
    ov_circuit,
    qk_circuit,
    virtual_edges,
)
from mikernels.circuits.find import find_circuit
from mikernels.circuits.interactions import (
    GradientInteractions,
    NamedInteractions,
    compute_gradient_interactions,
    select_top_k,
)
from mikernels.circuits.interpret import CircuitEdge, Circuits, interpret_circuits
from mikernels.circuits.minimal import Minimal, Ranking, minimal_circuit, rank_models
from mikernels.circuits.patterns import HeadScores, Patterns, attention_patterns, head_scores
from mikernels.circuits.probe import Component, Probe, gim_probe
from mikernels.circuits.ranking import Ranked
from mikernels.circuits.report.circuits import write_report
from mikernels.circuits.stability import Stability, stability
from mikernels.circuits.tasks import Task
from mikernels.models.rules import PRESETS, Effect, RuleReport, Rules, rules

__all__ = [
    "Circuit",
    "AblationEffect",
    "CircuitEdge",
    "Circuits",
    "Coactivation",
    "Component",
    "Curve",
    "Effect",
    "Erasure",
    "FeatureCircuit",
    "FeatureGraph",
    "GradientInteractions",
    "HeadCircuit",
    "HeadScores",
    "Minimal",
    "LogitLens",
    "NamedInteractions",
    "PRESETS",
    "Patterns",
    "Probe",
    "Ranked",
    "Ranking",
    "RuleReport",
    "Rules",
    "Selection",
    "Stability",
    "Task",
    "TokenAttribution",
    "attention_patterns",
    "ablate",
    "ablation_effect",
    "attribute",
    "coactivation",
    "composition_scores",
    "comprehensiveness",
    "compute_gradient_interactions",
    "faithfulness_curve",
    "feature_circuit",
    "feature_graph",
    "find_circuit",
    "gim_probe",
    "gradient_components",
    "head_scores",
    "interpret_circuits",
    "minimal_circuit",
    "random_circuit",
    "rank_models",
    "logit_lens",
    "neuron_activations",
    "ov_circuit",
    "qk_circuit",
    "rules",
    "select_top_k",
    "split_heads",
    "stability",
    "sufficiency",
    "tasks",
    "write_report",
    "virtual_edges",
]
