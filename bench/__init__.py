# SPDX-License-Identifier: Apache-2.0
"""Benchmarks: one declaration an operator, one harness, results as JSON, plots from JSON alone.

A declaration (`row_topk.py`, `encode.py`, ...) is data: shapes, inputs, providers, the cost
formula, the correctness gate and the speed to reach. `harness.py` runs it, `report.py` and
`plot.py` show it.
"""

from __future__ import annotations

import importlib

from .declare import Benchmark

NAMES = (
    "row_topk",
    "encode",
    "batch_topk",
    "decode",
    "gradients",
    "adam",
    "step",
    "edge_scores",
    "edge_heads",
    "edge_mix",
    "head_result",
    "pairwise_products",
    "pairwise_topk",
    "positional_dot",
    "grad_gram",
    "block_norms",
    "mass_threshold",
    "second_moment",
)


def load(name: str) -> Benchmark:
    """The declaration of one operator.

    Raises:
        ValueError: for a name that is not in NAMES.
    """
    if name not in NAMES:
        raise ValueError(
            f"bench: op must be one of {', '.join(NAMES)} or all, got {name!r}; "
            f"list them with `mikernels bench --list`"
        )
    benchmark: Benchmark = importlib.import_module(f"{__name__}.{name}").BENCHMARK
    return benchmark
