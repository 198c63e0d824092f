# SPDX-License-Identifier: Apache-2.0
"""Operators that select: row_topk, mass_threshold."""
