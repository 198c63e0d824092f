# SPDX-License-Identifier: Apache-2.0
"""What every family of kernels may use: offline compilation, products of tiles."""
