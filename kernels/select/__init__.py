# SPDX-License-Identifier: Apache-2.0
"""Selection: the order of scores, the k largest of a row."""
