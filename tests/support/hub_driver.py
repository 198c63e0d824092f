# SPDX-License-Identifier: Apache-2.0
"""Loads a kernel of the Hub beside the installed package: `hub_driver.py FOLDER`.

Prints the namespaces that hold operators, the kernel's level, the names that only one of the two
has, and the modules that no kernel may bring.
"""

import importlib.util
import json
import sys

import torch

import mikernels

# as the library `kernels` does: from a path, under a name of its own
package = sys.argv[1]
spec = importlib.util.spec_from_file_location(
    "kernel_of_the_hub", package + "/__init__.py", submodule_search_locations=[package]
)
kernel = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = kernel
spec.loader.exec_module(kernel)

# small integers: sums of products are exact, so that every implementation gives the same bits
x, w = (torch.randint(-4, 5, (n, 8)).float() for n in (5, 64))
ours, its = (m.topk_encode(x, w, k=3) for m in (mikernels, kernel))
assert torch.equal(ours.indices, its.indices) and torch.equal(ours.values, its.values)
assert type(ours) is not type(its)
names = torch._C._dispatch_get_all_op_names()
spaces = {name.split("::")[0] for name in names if name.endswith("::threshold_encode")}
brought = {m.split(".")[0] for m in sys.modules} & {"pydantic", "safetensors", "scipy", "rich"}
print(json.dumps([sorted(spaces), kernel.cpu_level(), sorted(brought)]))
print(json.dumps(sorted(set(mikernels.__all__) ^ set(kernel.__all__))))
