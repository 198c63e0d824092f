# SPDX-License-Identifier: Apache-2.0
"""What people make of features and components: evidence, a game, blind controls, agreement."""

from mikernels.rate.components import save_evidence

__all__ = ["save_evidence"]
