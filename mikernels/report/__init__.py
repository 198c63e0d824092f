# SPDX-License-Identifier: Apache-2.0
"""What is known of each feature of an SAE."""

from mikernels.report.collect import CollectedFeatures, collect_features
from mikernels.report.views import Example, Features, FeatureView
from mikernels.report.write import write_report

__all__ = [
    "CollectedFeatures",
    "Example",
    "FeatureView",
    "Features",
    "collect_features",
    "write_report",
]
