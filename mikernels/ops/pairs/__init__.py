# SPDX-License-Identifier: Apache-2.0
"""Pairwise operators: products of rows, edges, their strongest pairs."""
