# SPDX-License-Identifier: Apache-2.0
"""Fast, exact kernels for mechanistic interpretability.

Names are imported when the first of them is asked for: `mikernels --help` and shell completion take
0.2 s rather than the 1.5 s of torch, and `mikernels info` runs where torch does not.
`import mikernels.ops` registers the operators at once, for graphs that name them.
"""

from typing import TYPE_CHECKING, Any

from mikernels._version import __version__

if TYPE_CHECKING:
    from mikernels._public import *
    from mikernels.integrations.accelerate import accelerate

__all__ = [
    "Interactions",
    "SparseCodes",
    "__version__",
    "accelerate",
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


def __getattr__(name: str) -> Any:
    if name == "accelerate":  # 20 ms of imports that the operators need not
        from mikernels.integrations.accelerate import accelerate as found
    elif name in __all__:
        from mikernels import _public

        globals().update({public: getattr(_public, public) for public in _public.__all__})
        return globals()[name]
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
