# SPDX-License-Identifier: Apache-2.0
"""Source for the Triton compiler: device code, its launchers, its pinned configurations.

`select` chooses among scores, `sae` trains, `pairs` multiplies two sets of rows. A room imports
torch, triton, `common` and the rooms named before it, never mikernels. A launcher takes the
arguments of the operator's schema, validated by the public function, and returns what the operator
returns. Every kernel is listed in its module's `cases()`, which `common.offline` compiles for GPUs
that are not there.
"""
