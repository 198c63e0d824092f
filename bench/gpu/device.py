# SPDX-License-Identifier: Apache-2.0
"""Where a case runs: how its calls are timed, and what its memory and failures look like there.

On a GPU a call is timed by a pair of events, and the device is awaited once a round. Before the
first event the stream reads a buffer of four times the L2 (so that every call starts with a cold
cache, as calls on ever new inputs would; reading leaves no dirty lines whose write-back the call
would pay) and then spins for as long as the host needs to enqueue the call: what is measured is the
device's time, without launch gaps as long as the provider itself does not wait. The host's time of
the call is recorded beside it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

# the spin counts clock cycles; at a slower clock it lasts longer, which does no harm
CYCLES_PER_SECOND = 2e9
LONGEST_LEAD = 0.02
POISON_BYTES = 1 << 30


class Cpu:
    """Host clock; memory is measured in processes of their own (memory.py)."""

    kind = "cpu"
    target = torch.device("cpu")
    OutOfMemory: type[BaseException] = MemoryError

    def begin(self, lead: float) -> Any:
        return time.perf_counter()

    def end(self, mark: Any) -> Any:
        return time.perf_counter() - mark

    def settle(self) -> None:
        """Waits until all spans are known."""

    def seconds(self, span: Any) -> float:
        return float(span)

    def poison(self) -> None:
        """Makes memory that is handed out next hold NaN."""

    def release(self) -> None:
        """Gives cached memory back."""

    def second(self) -> str | None:
        """Another device of the kind, if there is one."""
        return None

    @contextmanager
    def making(self) -> Iterator[None]:
        """New tensors live on this device."""
        yield

    def median(self, function: Callable[[], object], times: int = 10, warm: int = 3) -> float:
        """Seconds of a call: the median of `times`, after `warm` others."""
        spans = []
        lead = 0.0
        for number in range(warm + times):
            mark = self.begin(lead)
            began = time.perf_counter()
            function()
            spans.append(self.end(mark))
            if number == warm - 1:
                lead = 1.5 * (time.perf_counter() - began)
        self.settle()
        return statistics.median(self.seconds(span) for span in spans[warm:])


class Cuda(Cpu):
    """CUDA events and torch's allocator.

    Args:
        api: torch.cuda, or what stands in for it in tests.
        target: where tensors live.
    """

    kind = "cuda"

    def __init__(self, api: Any = torch.cuda, target: str = "cuda"):
        self.api = api
        self.target = torch.device(target)
        self.OutOfMemory = torch.OutOfMemoryError
        self.properties = api.get_device_properties(api.current_device())
        l2 = getattr(self.properties, "L2_cache_size", 0) or 64 << 20
        with self.making():
            self._sweep = torch.ones(l2, dtype=torch.float32)  # 4 bytes each: four times the L2
            small = torch.ones(64, 64)
            # the matrix library's workspace is nobody's extra memory
            small @ small
        api.synchronize()

    def begin(self, lead: float) -> Any:
        self._sweep.amax()
        self.api._sleep(int(min(lead, LONGEST_LEAD) * CYCLES_PER_SECOND) + 1)
        start = self.api.Event(enable_timing=True)
        start.record()
        return start

    def end(self, mark: Any) -> Any:
        stop = self.api.Event(enable_timing=True)
        stop.record()
        return mark, stop

    def settle(self) -> None:
        self.api.synchronize()

    def seconds(self, span: Any) -> float:
        start, stop = span
        return float(start.elapsed_time(stop)) / 1e3

    def poison(self) -> None:
        # blocks of both of the allocator's pools, returned to it but not to the driver
        free = self.api.mem_get_info()[0]
        with self.making():
            held = [torch.full((1 << 16,), torch.nan) for _ in range(32)]
            held.append(torch.full((min(POISON_BYTES, free // 4) // 4,), torch.nan))
        del held

    def release(self) -> None:
        self.api.empty_cache()

    def second(self) -> str | None:
        return "cuda:1" if self.api.device_count() > 1 else None

    def capture(self, run: Callable[[], Any]) -> Any:
        """Outputs of a call that was captured in a graph and replayed."""
        side = self.api.Stream()
        side.wait_stream(self.api.current_stream())
        with self.api.stream(side):
            for _ in range(3):
                run()
        self.api.current_stream().wait_stream(side)
        graph = self.api.CUDAGraph()
        with self.api.graph(graph):
            outputs = run()
        graph.replay()
        self.api.synchronize()
        return outputs

    @contextmanager
    def making(self) -> Iterator[None]:
        with self.target:
            yield


class Meter:
    """Extra memory of one provider on a GPU: what it keeps, and the peak of a call above that.

    Bytes that the gate allocates in between (the yardstick's copy, the fp64 truth) are subtracted.
    """

    def __init__(self, device: Cpu):
        self.api = device.api if isinstance(device, Cuda) else None
        self._others = 0
        self._start = self._now()
        self.kept = 0

    def _now(self) -> int:
        return int(self.api.memory_allocated()) if self.api else 0

    @contextmanager
    def ignoring(self) -> Iterator[None]:
        before = self._now()
        yield
        self._others += self._now() - before

    def built(self) -> None:
        """To be called when outputs are gone and what is left belongs to the provider."""
        self.kept = max(0, self._now() - self._start - self._others)

    def watch(self) -> None:
        """To be called before the call that is measured."""
        self._before = self._now()

    def watch_peak(self) -> None:
        """To be called when its untimed part is over."""
        if self.api is not None:
            self.api.reset_peak_memory_stats()

    def extra(self) -> int:
        """Bytes above the inputs, at the peak since `watch_peak`."""
        peak = int(self.api.max_memory_allocated()) if self.api else 0
        return peak - self._before + self.kept


def get(name: str) -> Cpu:
    """The device of that name.

    Raises:
        ValueError: when it is unknown or torch does not see one.
    """
    if name not in ("cpu", "cuda"):
        raise ValueError(f"bench: device must be cpu or cuda, got {name!r}")
    if name == "cpu":
        return Cpu()
    if not torch.cuda.is_available():
        raise ValueError("bench: device cuda is not available: torch sees no GPU; use --device cpu")
    return Cuda()
