# SPDX-License-Identifier: Apache-2.0
"""One file per operator: equation, reference, schema, backends, gradient, public function."""
