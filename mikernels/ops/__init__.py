# SPDX-License-Identifier: Apache-2.0
"""One file per operator: equation, reference, schema, backends, gradient, public function."""

import importlib
import pkgutil

from mikernels._dispatch import OPS, Op


def registered() -> dict[str, Op]:
    """Every operator by its name, in order; one registers itself when its module is imported."""
    for module in pkgutil.walk_packages(__path__, f"{__name__}."):
        importlib.import_module(module.name)
    return dict(sorted(OPS.items()))
