# SPDX-License-Identifier: Apache-2.0
"""Benchmarks: one declaration an operator, one harness, results as JSON, plots from JSON alone.

A declaration (`ops/row_topk.py`, `ops/encode.py`, ...) is data: shapes, inputs, providers, the cost
formula, the correctness gate and the speed to reach. `harness/harness.py` runs it,
`harness/report.py` and `harness/plot.py` show it. `gpu/` is what only a GPU needs.
"""

from .ops import load, names

__all__ = ["load", "names"]
