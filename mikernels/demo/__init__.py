# SPDX-License-Identifier: Apache-2.0
"""`mikernels demo`: one SAE trained twice on real activations, compared, and shown in a report."""
