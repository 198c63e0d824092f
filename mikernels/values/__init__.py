# SPDX-License-Identifier: Apache-2.0
"""The values that flow between operators, models and training."""

from mikernels.values.batch import Batch
from mikernels.values.codes import SparseCodes
from mikernels.values.interactions import Interactions

__all__ = ["Batch", "Interactions", "SparseCodes"]
