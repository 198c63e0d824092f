# SPDX-License-Identifier: Apache-2.0
"""Circuits of features: SAEs' features as nodes, with what they leave out."""

from mikernels.circuits.features.attribution import FeatureCircuit, feature_circuit
from mikernels.circuits.features.coactive import (
    Coactivation,
    Components,
    Pair,
    coactivation,
)
from mikernels.circuits.features.edges import FeatureEdge, FeatureGraph, feature_graph
from mikernels.circuits.features.heads import HeadCircuit, ov_circuit, qk_circuit
from mikernels.circuits.features.lens import LogitLens, logit_lens
from mikernels.circuits.features.neurons import neuron_activations
from mikernels.circuits.features.nodes import Node, SiteScores
from mikernels.circuits.features.virtual import VirtualEdge, virtual_edges

__all__ = [
    "Coactivation",
    "Components",
    "FeatureCircuit",
    "FeatureEdge",
    "FeatureGraph",
    "HeadCircuit",
    "LogitLens",
    "Node",
    "Pair",
    "SiteScores",
    "VirtualEdge",
    "coactivation",
    "feature_circuit",
    "feature_graph",
    "logit_lens",
    "neuron_activations",
    "ov_circuit",
    "qk_circuit",
    "virtual_edges",
]
