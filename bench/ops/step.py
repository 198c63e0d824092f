# SPDX-License-Identifier: Apache-2.0
"""A whole training step: forward, loss, backward, projection, clipping, Adam, renormalisation.

All sides start from the same weights and batch. Each library runs its own step and its own extras:
SAELens neither projects nor renormalises (it rescales by decoder norms), sparsify does not clip and
minimises the fraction of variance unexplained. The gate compares the squared error, which all
share; our sides, eager and compile are also compared by the weights that they end with. BatchTopK
keeps other features of the batch, as many in all: it is held to the squared error of its own choice
in fp64.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch

from mikernels.nn import SAE, BatchTopKSAE, TopKSAE
from mikernels.training.config import TrainConfig
from mikernels.training.state.metrics import PARTS, Clock, Means
from mikernels.training.steps.autograd import AutogradStep, dense_forward, sparse_forward
from mikernels.training.steps.fused import FusedStep
from mikernels.training.steps.graph import GraphedStep
from mikernels.values.batch import Batch

from ..harness import peers
from ..harness.spec import (
    CPU,
    CUDA,
    Benchmark,
    Outputs,
    Provider,
    Runner,
    Shape,
    Target,
    Verdict,
    compiled,
)
from ..harness.synthetic import CLEAR_GAP, WEIGHTS, SAEBatch, exact_codes, exact_gradients

LR, EPS, CLIP = 1e-4, 1e-8, 1.0
# tokens, or slots, that the fp64 step of BatchTopK takes at a time
PIECE = 512


def _sae(batch: SAEBatch, kind: type[TopKSAE] | type[BatchTopKSAE] = TopKSAE) -> SAE:
    # not initialised twice: its random decoder is replaced
    sae = kind(batch.shape.d, batch.shape.f, k=batch.k)
    with torch.no_grad():
        for name, weight in zip(WEIGHTS, batch.weights(), strict=True):
            getattr(sae, name).copy_(weight)
    return sae


def _trainer_step(
    make: Callable[[SAE, TrainConfig], FusedStep | GraphedStep | AutogradStep],
    kind: type[TopKSAE] | type[BatchTopKSAE] = TopKSAE,
) -> Callable[[SAEBatch, str], Runner]:
    def build(batch: SAEBatch, mode: str) -> Runner:
        sae = _sae(batch, kind)
        config = TrainConfig(
            total_tokens=batch.shape.n, batch_size=batch.shape.n, lr=LR, eps=EPS, clip_norm=CLIP
        )
        take_step = make(sae, config)
        clock = Clock(dict.fromkeys(PARTS, 0.0))

        def run() -> Outputs:
            means = Means()
            dead = sae.dead().nonzero().squeeze(-1)
            take_step([Batch(batch.x)], batch.k, dead, means, clock)
            mse = torch.tensor(means.means()["mse"], dtype=torch.float64)
            return {"mse": mse} | {name: getattr(sae, name).detach() for name in WEIGHTS}

        return Runner(run)

    return build


def _compile(batch: SAEBatch, mode: str) -> Runner:
    sae = _sae(batch)
    optimizer = torch.optim.Adam(sae.parameters(), lr=LR, eps=EPS, fused=True)

    @compiled
    def loss_of(x, w_enc, b_enc, w_dec, b_dec):
        scores = torch.addmm(b_enc, x - b_dec, w_enc.T).relu()
        values, indices = scores.topk(batch.k, dim=-1, sorted=False)
        codes = torch.zeros_like(scores).scatter(-1, indices, values)
        return (codes @ w_dec + b_dec - x).square().sum(-1).mean()

    def run() -> Outputs:
        loss = loss_of(batch.x, *(getattr(sae, name) for name in WEIGHTS))
        loss.backward()
        sae.remove_parallel_gradient_()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), CLIP)
        optimizer.step()
        sae.normalize_decoder_()
        optimizer.zero_grad(set_to_none=True)
        return {"mse": loss.detach()} | {name: getattr(sae, name).detach() for name in WEIGHTS}

    return Runner(run)


def _in_bf16(batch: SAEBatch, mode: str) -> Runner:
    """Eager under autocast, the way dense training runs on a GPU; judged by its loss in bf16."""
    runner = _trainer_step(lambda sae, config: AutogradStep(sae, config, None, dense_forward))
    inner = runner(batch, mode)

    def run() -> Outputs:
        with torch.autocast(batch.x.device.type, torch.bfloat16):
            return {"mse": inner.run()["mse"].bfloat16()}

    return Runner(run)


def _graphed(sae: SAE, config: TrainConfig) -> GraphedStep:
    return GraphedStep(FusedStep(sae, dataclasses.replace(config, cuda_graph=True)))


def _unclipped(batch: SAEBatch, mode: str) -> Runner:
    """As sparsify trains. Adam then runs while gradients are in registers; judged by its loss."""

    def make(sae: SAE, config: TrainConfig) -> FusedStep:
        return FusedStep(sae, dataclasses.replace(config, clip_norm=None))

    inner = _trainer_step(make)(batch, mode)
    return Runner(lambda: {"mse": inner.run()["mse"]})


fused = _trainer_step(FusedStep)


def _batch_topk(batch: SAEBatch, mode: str) -> Runner:
    inner = _trainer_step(FusedStep, BatchTopKSAE)(batch, mode)
    return Runner(lambda: {"batch_mse": inner.run()["mse"]})


def _saelens(batch: SAEBatch, mode: str) -> Runner:
    trainer = peers.saelens_trainer(batch.weights(), batch.k, LR, batch.shape.n)

    def run() -> Outputs:
        output = trainer.step(batch.x)
        trainer.n_training_steps += 1
        return {"mse": output.loss.detach()}

    return Runner(run)


def _dictionary_learning(batch: SAEBatch, mode: str) -> Runner:
    trainer = peers.dictionary_learning_trainer(batch.weights(), batch.k, LR)
    # step 0 would move b_dec to the median of the batch
    step = 0

    def run() -> Outputs:
        nonlocal step
        step += 1
        return {"mse": torch.tensor(trainer.update(step, batch.x))}

    return Runner(run)


def sparsify_step(
    batch: SAEBatch, sae: Any, optimizer: torch.optim.Optimizer
) -> Callable[[], Outputs]:
    """The body of its Trainer.fit for one hookpoint."""
    did_fire = torch.zeros(batch.shape.f, dtype=torch.bool)
    since_fired = torch.zeros(batch.shape.f, dtype=torch.long)

    def run() -> Outputs:
        sae.set_decoder_norm_to_unit_norm()
        variance = (batch.x - batch.x.mean(0)).pow(2).sum()
        output = sae(x=batch.x, y=batch.x, dead_mask=None, total_variance=variance)
        did_fire[output.latent_indices.flatten()] = True
        fvu = float(output.fvu.detach())
        output.fvu.backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        since_fired.add_(batch.shape.n)
        since_fired[did_fire] = 0
        did_fire.zero_()
        return {"mse": fvu * variance.double() / batch.shape.n}

    return run


def _sparsify(batch: SAEBatch, mode: str) -> Runner:
    sae = peers.sparsify_sae(batch.weights(), batch.k)
    step = sparsify_step(batch, sae, torch.optim.Adam(sae.parameters(), lr=LR))
    # its forward pass is under bf16 autocast on a GPU
    low = batch.x.device.type == CUDA
    return Runner(lambda: {name: t.bfloat16() if low else t for name, t in step().items()})


def _check(batch: SAEBatch, mode: str, outputs: Outputs, eager: Outputs) -> Verdict:
    if batch.exact is None:
        batch.exact = _exact_step(batch)
    s = batch.shape
    loss = "batch_mse" if "batch_mse" in outputs else "mse"
    if loss not in batch.exact:
        batch.exact |= _exact_batch_error(batch)

    error, eager_error = (
        abs(float(o[name]) / float(batch.exact[name]) - 1)
        for o, name in ((outputs, loss), (eager, "mse"))
    )
    # N d squares of k-term sums of d-term products, summed pairwise: Higham's bound on each
    # a loss that is reported in bf16 comes from bf16 products
    low = outputs[loss].dtype == torch.bfloat16
    unit = torch.finfo(torch.bfloat16 if low else torch.float32).eps
    allowed = min(0.02, (math.log2(s.n * s.d) + s.k + math.log2(s.d)) * unit)
    if loss == "batch_mse":
        allowed += float(batch.exact["near_ties"] / batch.exact[loss])
    wrong = [] if error <= allowed else [f"{loss} off by {error:.1e}, allowed {allowed:.1e}"]
    for name, before in zip(WEIGHTS, batch.weights(), strict=True):
        if name in outputs:
            ours, theirs = (_rms(o[name].double() - batch.exact[name]) for o in (outputs, eager))
            limit = 2 * theirs + torch.finfo(torch.float32).eps * _rms(before.double())
            if not ours <= limit:
                wrong.append(f"{name}: rms error {ours:.1e}, allowed {limit:.1e}")
    return Verdict(not wrong, error, eager_error, "; ".join(wrong))


def _exact_batch_error(batch: SAEBatch) -> Outputs:
    """BatchTopK's squared error in fp64, and by how much its near ties at the cut may change it."""
    w_enc, b_enc, w_dec, b_dec = (w.double() for w in batch.weights())
    s = batch.shape
    total = batch.k * s.n
    values, places = torch.empty(0, dtype=torch.float64), torch.empty(0, dtype=torch.int64)
    for first in range(0, s.n, PIECE):
        h = (batch.x[first : first + PIECE].double() - b_dec) @ w_enc.T + b_enc
        values = torch.cat([values, h.relu_().flatten()])
        places = torch.cat([places, torch.arange(h.numel()) + first * s.f])
        values, best = values.topk(min(2 * total, len(values)))
        places = places[best]
    tokens, features = places // s.f, places % s.f
    error = b_dec - batch.x.double()
    for v, t, i in zip(*(a[:total].split(PIECE) for a in (values, tokens, features)), strict=True):
        error.index_add_(0, t, v[:, None] * w_dec[i])
    cut = values[total - 1]
    near = (values - cut).abs() <= CLEAR_GAP * cut
    v, along = values[near], (error[tokens[near]] * w_dec[features[near]]).sum(-1)
    return {
        "batch_mse": error.square().sum() / s.n,
        "near_ties": (2 * v * along.abs() + v.square()).sum() / s.n,
    }


def _rms(t: torch.Tensor) -> float:
    # Adam's first step is lr sign(g): where g is of rounding size single weights differ by lr in
    # every implementation, so weights are compared as a whole
    return float(t.square().mean().sqrt())


def _exact_step(batch: SAEBatch) -> Outputs:
    """The step in fp64: the squared error before it, and the weights after it."""
    values = exact_codes(batch)
    w_dec, b_dec = batch.w_dec.double(), batch.b_dec.double()
    error = b_dec - batch.x.double()
    for j, column in enumerate(batch.indices.unbind(-1)):
        error += values[:, j : j + 1] * w_dec[column]
    gradients = exact_gradients(batch, 2 * error / batch.shape.n, values)
    g = gradients["w_dec"]
    g -= (g * w_dec).sum(-1, keepdim=True) * w_dec
    norm = torch.stack([g.square().sum() for g in gradients.values()]).sum().sqrt()
    clip = (CLIP / (norm + 1e-6)).clamp(max=1.0)
    exact = {"mse": error.square().sum() / batch.shape.n}
    for name, before in zip(WEIGHTS, batch.weights(), strict=True):
        g = gradients[name] * clip
        # Adam's first step: both bias corrections cancel
        exact[name] = before.double() - LR * g / (g.abs() + EPS)
    exact["w_dec"] /= exact["w_dec"].norm(dim=-1, keepdim=True)
    return exact


def _flops(s: Shape, mode: str) -> float:
    # dense encode, then decode and three gradient products on k slots a token
    return 2 * s.n * s.d * s.f + 8 * s.n * s.k * s.d


BENCHMARK = Benchmark(
    name="step",
    summary="a whole training step, ours against the libraries' own",
    ops=("decode_error", "sae_update_"),
    modes=("step",),
    shapes={"step": ("S1",)},
    inputs=SAEBatch,
    providers=(
        Provider(
            "ours",
            fused,
            ours=True,
            screens=True,
        ),
        Provider(
            "ours_autograd",
            _trainer_step(lambda sae, config: AutogradStep(sae, config, None, sparse_forward)),
            screens=True,
        ),
        Provider(
            "eager",
            _trainer_step(lambda sae, config: AutogradStep(sae, config, None, dense_forward)),
        ),
        Provider("ours:batch_topk", _batch_topk, screens=True, devices=(CPU,)),
        Provider("ours:graph", _trainer_step(_graphed), screens=True, devices=(CUDA,)),
        Provider("ours:unclipped", _unclipped, screens=True, devices=(CUDA,)),
        Provider("eager_bf16", _in_bf16, devices=(CUDA,)),
        Provider("compile", _compile),
        Provider("sae_lens", _saelens),
        Provider("dictionary_learning", _dictionary_learning),
        Provider("sparsify", _sparsify),
    ),
    check=_check,
    flops=_flops,
    # two weight matrices under Adam, and w_enc once more for the encode
    bytes=lambda s, mode, size: (2 * 28 + 4) * s.f * s.d,
    targets=(
        Target("S1", "step", "sae_lens", 20.0),
        Target("S1", "step", "dictionary_learning", 15.0),
        Target("S1", "step", "sparsify", 5.0),
        Target("G2", "step", "sparsify", 2.0),
        Target("G2", "step", "eager", 4.0),
        Target("G2", "step", "eager_bf16", 4.0),
    ),
    gpu_shapes={"step": ("G1", "G2")},
    gpu_dtypes=("fp32",),
)
