# SPDX-License-Identifier: Apache-2.0
"""Backward rules: what a model's gradients are made of, changed place by place and accounted for.

`preset` says what rules there are, `scope` is the `with` block, `places` finds where they act;
`norms`, `attention` and `mlp` are the places, and `report` is what they did.
"""

from mikernels.models.rules.preset import PRESETS, Rules
from mikernels.models.rules.report import Effect, RuleReport
from mikernels.models.rules.scope import rules

__all__ = ["PRESETS", "Effect", "RuleReport", "Rules", "rules"]
