# SPDX-License-Identifier: Apache-2.0
"""Circuits of made-up scores."""

import torch

from mikernels.circuits import Circuit


def circuit(graph, scores, level="edge", replicates=None, **change):
    scores = torch.as_tensor(scores, dtype=torch.float32)
    if level == "edge" and scores.dim() == 1:
        scores = torch.zeros(graph.allowed().shape).masked_scatter(graph.allowed(), scores)
    none = scores.new_empty(0, *scores.shape)
    given = {"graph": graph, "level": level, "method": "eap", "label": "logit of ' [a]'"}
    given |= {"values": torch.tensor([2.0, 3.0]), "counterfactual_values": torch.tensor([-1.0, 0])}
    given |= {"replicates": none if replicates is None else replicates}
    return Circuit(**{**given, "scores": scores, "positions": None, "rules": None, **change})
