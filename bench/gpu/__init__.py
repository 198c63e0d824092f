# SPDX-License-Identifier: Apache-2.0
"""What a GPU needs: its clock and ceilings, the one check of everything, predictions, tuning."""
