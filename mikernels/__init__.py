# SPDX-License-Identifier: Apache-2.0
"""Fast, exact kernels for mechanistic interpretability."""

from mikernels._ext import cpu_level, force_level, supported_levels
from mikernels._version import __version__
from mikernels.codes import SparseCodes
from mikernels.ops.decode import sparse_decode
from mikernels.ops.encode import topk_encode
from mikernels.ops.gradients import by_feature
from mikernels.ops.row_topk import row_topk

__all__ = [
    "SparseCodes",
    "__version__",
    "by_feature",
    "cpu_level",
    "force_level",
    "row_topk",
    "sparse_decode",
    "supported_levels",
    "topk_encode",
]
