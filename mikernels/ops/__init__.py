# SPDX-License-Identifier: Apache-2.0
"""One file per operator: equation, reference, schema, backends, gradient, public function.

All are imported here, so that what is registered does not depend on who imports what.
"""

import importlib
import pkgutil

from mikernels.calls import log as _log

for _module in pkgutil.walk_packages(__path__, f"{__name__}."):
    importlib.import_module(_module.name)

# levels of logging that were set before operators were there
_log.refresh()
