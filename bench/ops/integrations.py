# SPDX-License-Identifier: Apache-2.0
"""Libraries' own training steps, as they are, accelerated, and with their Adam taken over too.

One step of the library's own trainer from the same weights and batch: SAELens' SAETrainer.step,
dictionary_learning's update, the body of sparsify's fit. What is accelerated is judged by its loss,
against that of the library's own step. "ours" is this package's own fused step of the same TopK
SAE: what is left to gain by leaving a library's trainer.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from mikernels.integrations.accelerate import accelerate

from ..harness import peers
from ..harness.spec import Benchmark, Outputs, Provider, Runner, Shape, Verdict
from ..harness.synthetic import SAEBatch
from .step import LR, fused, sparsify_step
from .variants import saelens_settings

ARCHITECTURES = ("topk", "batchtopk", "jumprelu", "matryoshka_batchtopk")
# a library's object -> how to take a step of it
Made = tuple[Any, Callable[[], Outputs]]


def _saelens(architecture: str) -> Callable[[SAEBatch], Made]:
    def make(batch: SAEBatch) -> Made:
        settings = saelens_settings(batch, architecture)
        trainer = peers.saelens_trainer(
            batch.weights(), batch.k, LR, batch.shape.n, architecture, settings
        )

        def run() -> Outputs:
            output = trainer.step(batch.x)
            trainer.n_training_steps += 1
            return {"loss": torch.as_tensor(output.loss).detach().double()}

        return trainer, run

    return make


def _dictionary_learning(batch: SAEBatch) -> Made:
    trainer = peers.dictionary_learning_trainer(batch.weights(), batch.k, LR)
    # step 0 would move b_dec to the median of the batch
    step = 0

    def run() -> Outputs:
        nonlocal step
        step += 1
        return {"loss": torch.tensor(trainer.update(step, batch.x), dtype=torch.float64)}

    return trainer, run


class _Holder:
    """What accelerate takes of sparsify's trainer, which is made of a model and a dataset."""

    def __init__(self, sae: Any, optimizer: torch.optim.Optimizer):
        self.saes, self.optimizers = {"sae": sae}, [optimizer]


_Holder.__module__ = "sparsify.trainer"


def _sparsify(batch: SAEBatch) -> Made:
    sae = peers.sparsify_sae(batch.weights(), batch.k)
    optimizer = torch.optim.Adam(sae.parameters(), lr=LR)
    step = sparsify_step(batch, sae, optimizer)
    return _Holder(sae, optimizer), lambda: {"loss": step()["mse"].cpu()}


LIBRARIES: dict[str, Callable[[SAEBatch], Made]] = {
    **{f"sae_lens:{name}": _saelens(name) for name in ARCHITECTURES},
    "dictionary_learning": _dictionary_learning,
    "sparsify": _sparsify,
}


def _plain(make: Callable[[SAEBatch], Made]) -> Callable[[SAEBatch, str], Runner]:
    def build(batch: SAEBatch, mode: str) -> Runner:
        _, run = make(batch)
        return Runner(lambda: {**run(), "own": torch.tensor(torch.nan)})

    return build


def _accelerated(
    make: Callable[[SAEBatch], Made], *, optimizer: bool
) -> Callable[[SAEBatch, str], Runner]:
    def build(batch: SAEBatch, mode: str) -> Runner:
        own = make(batch)[1]()["loss"]
        library, run = make(batch)
        report = accelerate(library, optimizer=optimizer)

        def step() -> Outputs:
            found = run()
            if report.dense:
                raise RuntimeError(f"integrations: made dense for {', '.join(report.dense)}")
            return {**found, "own": own}

        return Runner(step)

    return build


def _eager(batch: SAEBatch, mode: str) -> Runner:
    """The yardstick of every benchmark: SAELens' TopK step."""
    return _plain(_saelens("topk"))(batch, mode)


def _ours(batch: SAEBatch, mode: str) -> Runner:
    inner = fused(batch, mode)
    nothing = torch.tensor(torch.nan)
    return Runner(lambda: {"loss": inner.run()["mse"].cpu(), "own": nothing})


def _check(batch: SAEBatch, mode: str, outputs: Outputs, eager: Outputs) -> Verdict:
    own = float(outputs["own"])
    if own != own:
        return Verdict(True, 0.0, 0.0, "")
    error = abs(float(outputs["loss"]) / own - 1)
    s = batch.shape
    # sums of N d squares of k-term sums of d-term products; sparsify's step is in bf16 on a GPU
    low = batch.x.device.type == "cuda"
    unit = torch.finfo(torch.bfloat16 if low else torch.float32).eps
    allowed = min(0.02, 2 * (math.log2(s.n * s.d) + s.k + math.log2(s.d)) * unit)
    wrong = "" if error <= allowed else f"loss off by {error:.1e}, allowed {allowed:.1e}"
    return Verdict(not wrong, error, 0.0, wrong)


def _flops(s: Shape, mode: str) -> float:
    return 2 * s.n * s.d * s.f + 8 * s.n * s.k * s.d


BENCHMARK = Benchmark(
    name="integrations",
    summary="the libraries' own training steps, as they are and accelerated",
    ops=(),
    modes=("step",),
    shapes={"step": ("S1",)},
    inputs=SAEBatch,
    providers=(
        Provider("ours", _ours, ours=True, screens=True),
        Provider("eager", _eager),
        *(
            Provider(f"{name}{more}", build, screens=bool(more))
            for name, make in LIBRARIES.items()
            for more, build in (
                ("", _plain(make)),
                ("+accelerate", _accelerated(make, optimizer=False)),
                ("+accelerate+adam", _accelerated(make, optimizer=True)),
            )
        ),
    ),
    check=_check,
    flops=_flops,
    bytes=lambda s, mode, size: (2 * 28 + 4) * s.f * s.d,
    gpu_dtypes=("fp32",),
)
