# SPDX-License-Identifier: Apache-2.0
"""What a run is and has measured, on its way to the disk and back."""
