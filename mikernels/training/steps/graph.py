# SPDX-License-Identifier: Apache-2.0
"""The fused step as a CUDA graph: recorded once, then one launch a step.

A step launches many kernels, and at small sizes the GPU waits for the host that launches them. A
graph repeats exactly the recorded work on the recorded addresses, so batches are copied to buffers
that stay, and lr and the step counts are device tensors (`RowAdam(capturable=True)`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from mikernels import _triton
from mikernels.training.state.metrics import Clock, Means
from mikernels.training.steps.fused import FusedStep
from mikernels.values.batch import Batch


class GraphedStep:
    """A FusedStep that is recorded on its second call and replayed from then on, to the same bits.

    The first call runs eagerly: kernels are compiled and buffers allocated. So does the first call
    with another k, other batch shapes, or state that lies elsewhere after a `load_state_dict`; then
    the step is recorded anew. A step with AuxK always runs eagerly: the number of dead features
    decides its shapes, so it cannot be recorded.

    Args:
        step: on a CUDA device, whose optimiser is capturable.

    Raises:
        ValueError: for another device or optimiser.
    """

    def __init__(self, step: FusedStep):
        self.step, self.optimizer = step, step.optimizer
        self._device = step.sae.w_enc.device
        check_device(self._device)
        if not self.optimizer.capturable:
            raise ValueError(
                "Trainer: cuda_graph needs a RowAdam(..., capturable=True), got one that is not; "
                "make it so, or leave optimizer out"
            )
        self._inputs: list[Batch] = []
        self._sums = Means()
        self._replay: Callable[[], None] | None = None
        self._ran: tuple[object, ...] = ()
        self._stream: torch.cuda.Stream | None = None

    @torch.no_grad()
    def __call__(
        self, batches: list[Batch], k: Any, dead: torch.Tensor, means: Means, clock: Clock
    ) -> None:
        """As FusedStep."""
        if dead.numel() and self.step.sae.config.aux_coefficient:
            self.step(batches, k, dead, means, clock)
            return
        self._fill(batches)
        if self._key(k) != self._ran:
            self._replay = None
            self.step(self._inputs, k, dead, means, clock)
            self._ran = self._key(k)  # of the buffers that this step made
            return
        if self._replay is None:

            def work() -> None:
                self._sums = Means()
                self.step(self._inputs, k, dead, self._sums, clock)

            self._replay = self._record(work)
        self._replay()
        means.merge(self._sums)

    def _fill(self, batches: list[Batch]) -> None:
        shapes, held = ([_shapes(b) for b in batches] for batches in (batches, self._inputs))
        if shapes != held:
            copy = functools.partial(torch.clone, memory_format=torch.contiguous_format)
            self._inputs = [batch.map(copy) for batch in batches]
            return
        for own, batch in zip(self._inputs, batches, strict=True):
            for mine, given in zip(own.tensors(), batch.tensors(), strict=True):
                mine.copy_(given)

    def _key(self, k: Any) -> tuple[object, ...]:
        """What a recording is valid for: numbers by value, tensors by address."""
        optimizer = self.optimizer
        settings = [
            value
            for group in optimizer.param_groups
            for name, value in group.items()
            if name != "params"
        ]
        frozen = [p.requires_grad for p in self.step.sae.parameters()]
        inputs = [t for batch in self._inputs for t in batch.tensors()]
        held = [*inputs, *self.step.buffers(), optimizer.clip_norm, *settings, *frozen]
        return k, *(_identity(value) for value in held)

    def _record(self, work: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        # one stream for all recordings, since cuBLAS keeps a workspace for each; torch's own would
        # be that of the device which recorded first
        self._stream = self._stream or torch.cuda.Stream(self._device)
        # thread_local: the source may allocate in a thread of its own meanwhile
        with (
            torch.cuda.device(self._device),
            torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"),
        ):
            work()
        return graph.replay


def check_device(device: torch.device) -> None:
    """A device with CUDA graphs and kernels that never read it back, or a ValueError."""
    if device.type != "cuda":
        raise ValueError(
            f"Trainer: cuda_graph needs a CUDA device, got {device}; move the SAE with "
            f"sae.to('cuda') first, or leave cuda_graph out"
        )
    if reason := _triton.unsupported(device):
        raise ValueError(
            f"Trainer: cuda_graph needs Triton's kernels, since the references synchronise, got: "
            f"{reason}; or leave cuda_graph out"
        )


def _shapes(batch: Batch) -> list[torch.Size | None]:
    return [None if t is None else t.shape for t in (batch.input, batch.target, batch.weights)]


def _identity(value: object) -> object:
    if isinstance(value, torch.Tensor):
        return value.data_ptr(), value.dtype, value.shape
    return value
