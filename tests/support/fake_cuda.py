# SPDX-License-Identifier: Apache-2.0
"""torch.cuda's surface that the benchmarks use, over CPU tensors and a clock that ticks."""

from contextlib import nullcontext
from types import SimpleNamespace


class FakeCuda:
    """Every event and every allocator question advances time and memory by known amounts."""

    def __init__(self):
        self.now_ms = 0.0
        self.pending = []
        self.spins = []
        self.synchronized = 0
        self.bytes = 1 << 20
        self.peak = self.bytes

    def Event(self, enable_timing: bool):
        assert enable_timing
        return _Event(self)

    def synchronize(self):
        self.pending.clear()
        self.synchronized += 1

    def _sleep(self, cycles: int):
        assert isinstance(cycles, int) and cycles > 0
        self.spins.append(cycles)

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def get_device_properties(self, index: int):
        return SimpleNamespace(
            name="Fake GPU",
            multi_processor_count=132,
            L2_cache_size=1 << 16,
            total_memory=80 << 30,
            major=9,
            minor=0,
        )

    def mem_get_info(self):
        return 1 << 20, 80 << 30

    def memory_allocated(self) -> int:
        return self.bytes

    def max_memory_allocated(self) -> int:
        return self.bytes + 4096

    def reset_peak_memory_stats(self):
        self.peak = self.bytes

    def empty_cache(self):
        pass

    captured = 0

    def Stream(self):
        return SimpleNamespace(wait_stream=lambda other: None)

    current_stream = Stream

    def stream(self, stream):
        return nullcontext()

    def CUDAGraph(self):
        return SimpleNamespace(replay=lambda: None)

    def graph(self, graph):
        self.captured += 1
        return nullcontext()


class _Event:
    def __init__(self, api: FakeCuda):
        self.api = api
        self.at = None

    def record(self):
        self.api.now_ms += 0.5
        self.at = self.api.now_ms
        self.api.pending.append(self)

    def elapsed_time(self, other: "_Event") -> float:
        # as the real one: an error before both have happened
        assert self not in self.api.pending and other not in self.api.pending
        return other.at - self.at
