# SPDX-License-Identifier: Apache-2.0
"""SAE modules made of the operators."""

from mikernels.nn.geometric_median import geometric_median
from mikernels.nn.topk_sae import SAEConfig, SAEOutput, TopKSAE

__all__ = ["SAEConfig", "SAEOutput", "TopKSAE", "geometric_median"]
