# SPDX-License-Identifier: Apache-2.0
"""The fused step by Triton: against the reference, and, on a GPU, from a CUDA graph."""

import copy
import os

import pytest
import torch
from oracle import assert_accurate, identical, randn

from mikernels import _triton
from mikernels.activations import TensorSource
from mikernels.nn import TopKSAE
from mikernels.optim import RowAdam
from mikernels.training import TrainConfig, Trainer
from mikernels.training.optimizer import set_rate
from mikernels.training.state.metrics import MEANS, Clock, History, Means
from mikernels.training.steps.autograd import AutogradStep, dense_forward
from mikernels.training.steps.fused import FusedStep
from mikernels.training.steps.graph import GraphedStep
from mikernels.values.batch import Batch

# a program takes the interpreter 0.5 ms and more, and a step has one a token and one a feature
D, F, K, BATCH = 12, 40, 3, 6
STEPS = 2

cuda_only = pytest.mark.skipif(
    _triton.interpreting() or not torch.cuda.is_available(), reason="needs a CUDA device"
)


def make_sae(d: int = D, n_features: int = F, k: int = K, **settings) -> TopKSAE:
    settings = {"dead_after": 10**6, "k_aux": 5, **settings}
    return TopKSAE(d, n_features, k, generator=torch.Generator().manual_seed(0), **settings)


def config(batch: int = BATCH, **settings) -> TrainConfig:
    # eps: no update is a sign of rounding noise
    settings = {"lr": 3e-3, "eps": 1e-3, "clip_norm": 0.5, **settings}
    return TrainConfig(**{"total_tokens": 10 * batch, "batch_size": batch, **settings})


def batches(device: str, seed: int, count: int = 1, size: int = BATCH, d: int = D):
    return [Batch((randn(size, d, seed=100 * seed + i) + 1).to(device)) for i in range(count)]


def clock() -> Clock:
    return Clock(History().parts)


def state_of(sae: TopKSAE, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Weights with their moments, and the counters."""
    names = ("exp_avg", "exp_avg_sq")
    found = [t for p in sae.parameters() for t in (p, *(optimizer.state[p][n] for n in names))]
    return [t.detach() for t in (*found, sae.tokens_since_fired)]


def train(
    device: str, step: str, dtype: torch.dtype, loss: str, dead: list[int], at_once: bool = False
):
    """A few steps; the state and the losses, on the CPU. `at_once`: nothing needs the gradients."""
    settings = config(clip_norm=None if at_once else 0.5)
    sae = make_sae(loss=loss).to(device=device, dtype=dtype)
    update = (
        FusedStep(sae, settings)
        if step == "fused"
        else AutogradStep(sae, settings, None, dense_forward)
    )
    means, features = Means(), torch.tensor(dead, dtype=torch.int64, device=device)
    for number in range(STEPS):
        inputs = batches(device, number, 1 if at_once else 2)
        inputs = [batch.to(torch.device(device), dtype) for batch in inputs]
        update(inputs, K, features, means, clock())
    if step == "fused":
        matrices = sae.w_dec in update.gradients
        assert matrices != (at_once and os.environ["MIKERNELS_IMPL"] == "triton")
    losses = [torch.tensor(means.read()[name]) for name in MEANS]
    return [t.cpu() for t in (*state_of(sae, update.optimizer), *losses)]


@pytest.mark.parametrize(
    "loss, dead, at_once", [("mse", [], False), ("fvu", [1, 5, 30], False), ("fvu", [], True)]
)
def test_the_fused_step_is_that_of_autograd(device, monkeypatch, loss, dead, at_once) -> None:
    """Against plain PyTorch in fp64, and no worse than the fused step by the references."""
    results = []
    for impl, step, dtype in (
        ("triton", "fused", torch.float32),
        ("reference", "dense", torch.float64),
        ("reference", "fused", torch.float32),
    ):
        monkeypatch.setenv("MIKERNELS_IMPL", impl)
        results.append(train(device, step, dtype, loss, dead, at_once))
    for actual, oracle, eager in zip(*results, strict=True):
        if actual.is_floating_point():
            assert_accurate(actual, oracle, eager)
        else:
            assert torch.equal(actual, oracle)


@pytest.mark.parametrize("frozen", ["w_dec", "w_enc", "b_enc", "b_dec"])
def test_a_frozen_parameter_stays_put_where_adam_runs_in_registers(
    device, monkeypatch, frozen
) -> None:
    monkeypatch.setenv("MIKERNELS_IMPL", "triton")
    sae = make_sae().to(device)
    getattr(sae, frozen).requires_grad_(False)
    before = {name: p.detach().clone() for name, p in sae.named_parameters()}
    update = FusedStep(sae, config(clip_norm=None))
    nothing = torch.empty(0, dtype=torch.int64, device=device)
    for number in range(2):
        update(batches(device, number), K, nothing, Means(), clock())
    for name, p in sae.named_parameters():
        assert torch.equal(p, before[name]) == (name == frozen), name


class Pair:
    """A fused step and its twin from a graph, on the same batches."""

    def __init__(self, dtype: torch.dtype, **settings):
        self.d, n_features, k = 256, 2048, 16
        self.steps, self.means = [], [Means(), Means()]
        for cuda_graph in (False, True):
            sae = make_sae(self.d, n_features, k).to("cuda", dtype)
            step = FusedStep(sae, config(128, cuda_graph=cuda_graph, **settings))
            self.steps.append(GraphedStep(step) if cuda_graph else step)
        self.saes = [self.steps[0].sae, self.steps[1].step.sae]

    def run(self, seed: int, *, k: int = 16, dead: list[int] = (), count: int = 1, size: int = 128):
        features = torch.tensor(dead, dtype=torch.int64, device="cuda")
        for step, means in zip(self.steps, self.means, strict=True):
            set_rate(step.optimizer, 3e-3 / (seed + 1))
            step(batches("cuda", seed, count, size, self.d), k, features, means, clock())
        pairs = zip(self.saes, self.steps, strict=True)
        first, second = (state_of(sae, step.optimizer) for sae, step in pairs)
        assert all(identical(a.cpu(), b.cpu()) for a, b in zip(first, second, strict=True)), seed
        assert self.means[0].read() == self.means[1].read()


@cuda_only
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count, clip_norm", [(1, 0.5), (2, 0.5), (1, None)])
def test_a_replayed_step_has_the_bits_of_an_eager_one(weights, count, clip_norm) -> None:
    pair = Pair(weights, clip_norm=clip_norm)
    for seed in range(6):
        pair.run(seed, count=count)
    assert pair.steps[1]._replay is not None


@cuda_only
def test_a_graph_follows_what_changes() -> None:
    pair = Pair(torch.float32)
    seed = iter(range(100))
    for settings in (
        {}, {"dead": [3, 700]}, {}, {"k": 8}, {"size": 40}, {"count": 3}, {"size": 128},
    ):  # fmt: skip
        for _ in range(3):
            pair.run(next(seed), **settings)
    for step in pair.steps:
        step.optimizer.load_state_dict(copy.deepcopy(step.optimizer.state_dict()))
    for _ in range(3):
        pair.run(next(seed))


@cuda_only
def test_a_trainer_with_a_graph_computes_the_same() -> None:
    runs = []
    for cuda_graph in (False, True):
        sae = make_sae(dead_after=5 * BATCH).cuda()
        settings = config(cuda_graph=cuda_graph, decay="cosine", log_every=3)
        source = TensorSource(batches("cpu", 0, size=10 * BATCH)[0].input, BATCH, seed=0)
        trainer = Trainer(sae, source, settings, quiet=True)
        rows = trainer.run().rows
        runs.append((state_of(sae, trainer.optimizer), [row["loss"] for row in rows]))
    assert runs[0][1] == runs[1][1]
    assert all(identical(a.cpu(), b.cpu()) for a, b in zip(runs[0][0], runs[1][0], strict=True))


@cuda_only
def test_a_step_that_cannot_be_replayed_is_not_recorded() -> None:
    p = torch.nn.Parameter(torch.ones(8, device="cuda"))
    for optimizer, message in (
        (RowAdam([p]), "capturable=True"),
        (RowAdam([p], capturable=True), "the first step makes the state"),
    ):
        with pytest.raises(RuntimeError, match=message), torch.cuda.graph(torch.cuda.CUDAGraph()):
            optimizer.apply_gradients({p: p.detach()})


@cuda_only
def test_a_fused_step_does_not_synchronise() -> None:
    pair = Pair(torch.float32)
    pair.run(0)
    inputs, nothing = (
        batches("cuda", 1, 2, 128, pair.d),
        torch.empty(0, dtype=torch.int64, device="cuda"),
    )
    pair.steps[0](inputs, 16, nothing, pair.means[0], clock())
    torch.cuda.set_sync_debug_mode("error")
    try:
        pair.steps[0](inputs, 16, nothing, pair.means[0], clock())
    finally:
        torch.cuda.set_sync_debug_mode("default")
