# SPDX-License-Identifier: Apache-2.0
"""Calls every operator with mangled arguments: `hostile_driver.py HOW`, "raw" or an `impl`.

A process of its own: a crash ends it, and the last line printed names the culprit. What breaks the
rules of an operator's operands, or is an index outside, must raise; all else only must not crash.
"""

import faulthandler
import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parent))

from op_samples import LAYOUTS, SAMPLES, copies, mangled  # noqa: E402

from mikernels import _triton  # noqa: E402
from mikernels._dispatch import OPS, Op  # noqa: E402

if _triton.interpreting():
    import interpreter_once

    interpreter_once.install()

# int64 operands whose entries are places; prefixes and ranks are compared only. Kernels by slots
# have no use for indices
PLACES = {"indices", "positions", "order", "offsets", "row_offsets", "tokens", "levels"}
UNUSED = {("sae_gradients_", "indices"), ("sae_update_", "indices")}


def must_raise(op: Op, what: str, arguments: tuple) -> bool:
    try:
        op.operands.check(arguments)
    except (TypeError, ValueError):
        return True
    place = int(what.split()[1].rstrip(":"))
    name = op.default._schema.arguments[place].name
    return "among the entries" in what and name in PLACES and (op.name, name) not in UNUSED


def main(how: str) -> None:
    wrong = []
    for name, op in OPS.items():
        if how == "triton" and op.backends()["triton"] == "not written":
            continue
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            if how == "triton" and dtype != torch.float32:
                continue
            for sample in SAMPLES[name](LAYOUTS["dense"], 5, dtype):
                for what, bad in mangled(sample):
                    print(name, dtype, what, flush=True)
                    expected = must_raise(op, what, bad)
                    arguments = copies(bad)
                    try:
                        if how == "raw":
                            op.default(*arguments)
                        else:
                            op(*arguments, impl=how)
                    except (RuntimeError, TypeError, ValueError, IndexError):
                        continue
                    # on a GPU an index outside is no error, but reads nothing outside
                    if expected and not (how == "triton" and "among the entries" in what):
                        wrong.append(f"{name} {dtype} {what}")
    assert not wrong, "accepted: " + "; ".join(wrong)
    print("survived")


if __name__ == "__main__":
    faulthandler.enable()
    main(sys.argv[1])
