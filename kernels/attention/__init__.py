# SPDX-License-Identifier: Apache-2.0
"""Attention: its gradients, whose pattern is never in memory."""
