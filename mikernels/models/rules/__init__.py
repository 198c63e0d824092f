# SPDX-License-Identifier: Apache-2.0
"""Backward rules: what a model's gradients are made of, changed place by place and accounted for.

`context` is the `with` block; `preset` says what rules there are, `places` finds where they act:
`norms`, `attention` and `mlp`. `scope` decides which rule holds there, `report` is what it did.
"""

from mikernels.models.rules.context import rules
from mikernels.models.rules.preset import PRESETS, Rules
from mikernels.models.rules.report import Effect, RuleReport

__all__ = ["PRESETS", "Effect", "RuleReport", "Rules", "rules"]
