# SPDX-License-Identifier: Apache-2.0
"""Circuits of features: SAEs' features as nodes, with what they leave out."""

from mikernels.circuits.features.feature_circuit import FeatureCircuit, feature_circuit
from mikernels.circuits.features.feature_graph import FeatureEdge, FeatureGraph, feature_graph
from mikernels.circuits.features.nodes import Node, SiteScores

__all__ = [
    "FeatureCircuit",
    "FeatureEdge",
    "FeatureGraph",
    "Node",
    "SiteScores",
    "feature_circuit",
    "feature_graph",
]
