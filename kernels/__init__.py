# SPDX-License-Identifier: Apache-2.0
"""Triton device code, installed as `mikernels.kernels`. Imports torch, triton and siblings only."""
