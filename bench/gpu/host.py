# SPDX-License-Identifier: Apache-2.0
"""What a call of a Triton launcher costs the host, without a GPU.

The driver is a stand-in that takes every launch and does nothing; operands are small and on the
CPU, so that torch's part of a call is its dispatch. Kernels are compiled first, for sm_90. What is
reported is the launcher's Python, torch's and Triton's: not the operator's checks, not the driver.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch

ROUNDS, CALLS = 30, 20


class _Driver:
    """As much of Triton's driver as a launch asks for."""

    def __init__(self, target: Any):
        self.target = target
        self.utils = self

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 1 << 20}

    def load_binary(self, *args: Any) -> tuple[int, ...]:
        return 1, 1, 0, 0, 1024

    def unload_module(self, module: Any) -> None:
        pass

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        return lambda *args: None


@contextmanager
def without_a_gpu() -> Iterator[None]:
    """Launches are compiled, and go nowhere."""
    from triton.runtime.driver import driver

    from mikernels.kernels.common.offline import TARGETS

    before = driver._active
    driver.set_active(_Driver(TARGETS["sm_90"]))
    try:
        yield
    finally:
        driver._active = before


def launches_of(call: Callable[[], Any]) -> list[Callable[[], Any]]:
    """Each launch of a call, to be done again without its launcher."""
    from mikernels.kernels.common.launch import Kernel

    found: list[Callable[[], Any]] = []
    launched = Kernel.__getitem__

    def recorded(kernel: Kernel, grid: tuple[int, ...]) -> Callable[..., Any]:
        def launch(*args: Any, **options: Any) -> None:
            found.append(lambda: launched(kernel, grid)(*args, **options))

        return launch

    with patch.object(Kernel, "__getitem__", recorded):
        call()
    return found


def calls() -> dict[str, Callable[[], Any]]:
    """Operator -> a call of its launcher, at few tokens."""
    from mikernels.kernels.sae import (
        adam,
        adam_sumsq,
        decode,
        decode_levels,
        gradients,
        gradients_row_sum,
        gradients_sum,
        update,
    )
    from mikernels.kernels.select import row_topk

    # enough slots for hot features, whose shares are launches of their own
    n, k, f, d = 64, 32, 64, 768
    values, indices = torch.rand(n, k), torch.randint(f, (n, k))
    x, w, m, v = torch.rand(n, d), torch.rand(f, d), torch.zeros(f, d), torch.ones(f, d)
    bias, scores, levels = torch.zeros(d), torch.rand(4, 32768), torch.zeros(f, dtype=torch.int64)
    sums, sums_enc, sum_bias = torch.zeros(f, d), torch.zeros(f, d), torch.zeros(f)
    slots = indices.reshape(-1).sort(stable=True)
    offsets, order = torch.searchsorted(slots[0], torch.arange(f + 1)), slots[1]
    hyper = torch.tensor(1e-3), 0.9, 0.999, 1e-8, torch.tensor(1), torch.tensor(1.0)
    codes = values, indices, offsets, order, None
    return {
        "row_topk": lambda: row_topk.row_topk(scores, k, False),
        "decode": lambda: decode.decode(values, indices, None, w, bias),
        "decode_error": lambda: decode.decode_error(values, indices, None, w, bias, x),
        "decode_levels": lambda: decode_levels.decode_levels(
            values, indices, None, w, bias, x, levels, torch.ones(2, 2)
        ),
        "gather_dot": lambda: gradients.gather_dot(x, w, indices, None, None),
        "feature_sum": lambda: gradients_sum.feature_sum(values, x, offsets, order, None),
        "sae_gradients_": lambda: gradients_sum.sae_gradients_(
            *codes, x, x, w, None, None, sums, sums_enc, sum_bias, False
        ),
        "weighted_row_sum": lambda: gradients_row_sum.weighted_row_sum(sum_bias, w),
        "adam_rows_": lambda: adam.adam_rows_(w, m, m, v, *hyper, True, True),
        "grad_sumsq": lambda: adam_sumsq.grad_sumsq(m, w, True),
        "sae_update_": lambda: update.sae_update_(
            *codes, x, x, w, sums, m, v, sums_enc, v, None, None, *hyper, True, True
        ),
    }


def seconds(run: Callable[[], Any]) -> float:
    """Of a call: the least of many, for what else the machine does only adds."""
    least = float("inf")
    for _ in range(ROUNDS):
        began = time.perf_counter()
        for _ in range(CALLS):
            run()
        least = min(least, (time.perf_counter() - began) / CALLS)
    return least


def costs() -> Iterator[tuple[str, int, float, float]]:
    """(operator, launches, seconds of a call, Triton's own part of them)."""
    torch.set_num_threads(1)
    with without_a_gpu():
        for name, call in calls().items():
            launches = launches_of(call)
            yield name, len(launches), seconds(call), sum(map(seconds, launches))
