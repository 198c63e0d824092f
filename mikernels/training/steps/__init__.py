# SPDX-License-Identifier: Apache-2.0
"""One optimiser step, in three ways: fused, under autograd, in plain PyTorch; and as a graph."""
