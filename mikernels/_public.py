# SPDX-License-Identifier: Apache-2.0
"""The operators and values of `mikernels.__all__`; importing them registers every operator."""

from mikernels._ext import cpu_level, force_level, supported_levels
from mikernels.calls.log import log
from mikernels.ops.attention.attention_gradients import attention_gradients
from mikernels.ops.pairs.block_norms import block_norms
from mikernels.ops.pairs.edge_heads import edge_scores_heads
from mikernels.ops.pairs.edges import edge_mix, edge_scores
from mikernels.ops.pairs.feature_edges import edge_topk, feature_edges, qk_interactions
from mikernels.ops.pairs.grad_gram import grad_gram
from mikernels.ops.pairs.pair_products import pairwise_products
from mikernels.ops.pairs.pairwise_topk import pairwise_topk
from mikernels.ops.pairs.positional_dot import positional_dot
from mikernels.ops.pairs.second_moment import second_moment
from mikernels.ops.sae.batch_topk_encode import batch_topk_encode
from mikernels.ops.sae.decode import sparse_decode
from mikernels.ops.sae.encode import topk_encode
from mikernels.ops.sae.gradients import by_feature
from mikernels.ops.sae.groupmax_encode import groupmax_encode
from mikernels.ops.sae.jump import jump, step_above
from mikernels.ops.sae.threshold_encode import threshold_encode
from mikernels.ops.select.mass_threshold import mass_threshold
from mikernels.ops.select.row_topk import row_topk
from mikernels.values.codes import SparseCodes
from mikernels.values.interactions import Interactions

__all__ = [
    "Interactions",
    "SparseCodes",
    "attention_gradients",
    "batch_topk_encode",
    "block_norms",
    "by_feature",
    "cpu_level",
    "edge_mix",
    "edge_scores",
    "edge_scores_heads",
    "edge_topk",
    "feature_edges",
    "force_level",
    "grad_gram",
    "groupmax_encode",
    "jump",
    "log",
    "mass_threshold",
    "pairwise_products",
    "pairwise_topk",
    "positional_dot",
    "qk_interactions",
    "row_topk",
    "second_moment",
    "sparse_decode",
    "step_above",
    "supported_levels",
    "threshold_encode",
    "topk_encode",
]
