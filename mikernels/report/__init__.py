# SPDX-License-Identifier: Apache-2.0
"""What is known of each feature of an SAE."""

from mikernels.report.views import Example, Features, FeatureView

__all__ = ["Example", "FeatureView", "Features"]
