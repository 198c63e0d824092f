# SPDX-License-Identifier: Apache-2.0
"""What is known of each feature of an SAE."""

from mikernels.report.views import Example, Features, FeatureView
from mikernels.report.write import write_report

__all__ = ["Example", "FeatureView", "Features", "write_report"]
