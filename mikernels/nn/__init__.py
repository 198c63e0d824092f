# SPDX-License-Identifier: Apache-2.0
"""SAE modules made of the operators."""

from mikernels.nn.batch_topk_sae import BatchTopKConfig, BatchTopKSAE
from mikernels.nn.geometric_median import geometric_median
from mikernels.nn.sae import SAE, SAEConfig, SAEOutput
from mikernels.nn.topk_sae import TopKConfig, TopKSAE

# what checkpoints call them
ARCHITECTURES: dict[str, type[SAE]] = {v.architecture: v for v in (TopKSAE, BatchTopKSAE)}

__all__ = [
    "ARCHITECTURES",
    "SAE",
    "BatchTopKConfig",
    "BatchTopKSAE",
    "SAEConfig",
    "SAEOutput",
    "TopKConfig",
    "TopKSAE",
    "geometric_median",
]
