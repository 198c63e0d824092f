# SPDX-License-Identifier: Apache-2.0
"""Products of pairs: edge and pairwise scores, Gram matrices, norms of blocks."""
