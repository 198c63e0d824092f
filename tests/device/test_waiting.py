# SPDX-License-Identifier: Apache-2.0
"""Which operators make the host wait for the device: those that no CUDA graph can hold."""

import op_samples
import torch
from oracle import randn
from torch.utils._python_dispatch import TorchDispatchMode

from mikernels._dispatch import OPS
from mikernels.bench.gpu import gpu_parts
from mikernels.kernels.pairs import pairwise_topk

# a number for the host, or a tensor whose size the device decides
NUMBERS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2"}

# enough pairs for a screen, which is where the search waits
SCREENED = randn(1, 1, 40, 24), randn(1, 1, 260, 24), *[None] * 4, 5, "abs", -float("inf"), False


class Asked(TorchDispatchMode):
    """Whether anything asked for a number."""

    answer = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.answer |= func._overloadpacket.__name__ in NUMBERS
        return func(*args, **(kwargs or {}))


def waits(device: str, op, arguments) -> bool:
    if device == "cpu":
        with Asked() as asked:
            op(*arguments, impl="triton")
        return asked.answer
    torch.cuda.set_sync_debug_mode("error")
    try:
        op(*arguments, impl="triton")
    except RuntimeError as error:
        assert "synchroniz" in str(error)
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


def test_the_operators_that_wait_are_those_that_no_graph_holds(device, monkeypatch) -> None:
    monkeypatch.setattr(pairwise_topk, "LITTLE", 0)
    monkeypatch.setattr(pairwise_topk, "FEWEST", 1)
    written = {name: op for name, op in OPS.items() if op.state("triton") == "ready"}
    waiting = set()
    for name, op in written.items():
        made = op_samples.SAMPLES[name](op_samples.dense, 5, torch.float32)
        for arguments in [*made, *([SCREENED] if name == "pairwise_topk" else [])]:
            if waits(device, op, gpu_parts.on(device, arguments)):
                waiting.add(name)
    assert waiting == gpu_parts.WAITING & written.keys()
