# SPDX-License-Identifier: Apache-2.0
"""The fused step of every variant, at the size and L0 of TopK's: the same weights and tokens.

Each variant is judged by its squared error, against that of the codes that it selects in fp64 (what
it selects is the business of its encoder's own benchmark). SAELens' steps of the same variant run
beside it. A crosscoder's row holds as many numbers as an SAE's, its layers being parts of the
activations; so do the decoder rows of a cross-layer transcoder of one layer, which is what more
layers are compared with by row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from mikernels.nn import (
    SAE,
    BatchTopKSAE,
    Crosscoder,
    CrossLayerTranscoder,
    GatedSAE,
    JumpReLUSAE,
    LISTAMatryoshkaSAE,
    MatryoshkaSAE,
    ReLUSAE,
    SkipTranscoder,
    TopKSAE,
    Transcoder,
)
from mikernels.nn.matryoshka_sae import default_widths
from mikernels.ops.sae.batch_topk_encode import batch_topk_encode
from mikernels.training.config import TrainConfig
from mikernels.training.state.metrics import PARTS, Clock, Means
from mikernels.training.steps.autograd import AutogradStep, dense_forward
from mikernels.training.steps.fused import FusedStep
from mikernels.values.batch import Batch

from ..harness import peers
from ..harness.spec import CPU, Benchmark, Outputs, Provider, Runner, Shape, Target, Verdict
from ..harness.synthetic import WEIGHTS, SAEBatch

LR, EPS, CLIP = 1e-4, 1e-8, 1.0
LEVELS, LAYERS = 5, 4


def _cut(batch: SAEBatch) -> torch.Tensor:
    """The score that leaves k features per token of the batch above it, on average."""
    _, threshold = batch_topk_encode(
        batch.x, batch.w_enc, batch.b_enc, k=float(batch.k), b_dec=batch.b_dec
    )
    return threshold


def _with_weights(sae: SAE, batch: SAEBatch) -> SAE:
    with torch.no_grad():
        for name, weight in zip(WEIGHTS, batch.weights(), strict=True):
            if getattr(sae, name).shape == weight.shape:
                getattr(sae, name).copy_(weight)
        if isinstance(sae, CrossLayerTranscoder):
            sae.decoder(0).copy_(batch.w_dec)
        if isinstance(sae, JumpReLUSAE):
            sae.threshold.fill_(float(_cut(batch)))
        if isinstance(sae, ReLUSAE | GatedSAE):
            sae.b_enc.sub_(_cut(batch))
    return sae


def _make(kind: type[SAE], batch: SAEBatch) -> SAE:
    s = batch.shape
    settings: dict[type[SAE], dict[str, Any]] = {
        TopKSAE: {"k": s.k},
        BatchTopKSAE: {"k": s.k},
        # a penalty that is computed, and leaves L0 as it is
        JumpReLUSAE: {"target_l0": s.k, "l0_coefficient": 0.0},
        MatryoshkaSAE: {"k": s.k, "widths": default_widths(s.f, s.k, LEVELS)},
        LISTAMatryoshkaSAE: {"k": s.k, "widths": default_widths(s.f, s.k, LEVELS)},
        Transcoder: {"k": s.k},
        SkipTranscoder: {"k": s.k},
        Crosscoder: {"k": s.k, "n_layers": LAYERS},
        CrossLayerTranscoder: {"k": s.k, "n_layers": 1},
    }
    return _with_weights(kind(s.d, s.f, **settings.get(kind, {})), batch)  # type: ignore[call-arg]


def _exact_error(sae: SAE, batch: Batch) -> float:
    """The squared error per token in fp64 of what the variant selects in training."""
    codes = sae.select(batch.input, sae.k).detach().to(torch.float64)
    with torch.no_grad():
        sae.double()
        error = sae.output(codes) - batch.output.double()
        if (more := sae.past_codes(batch.input.double())) is not None:
            error += more
        sae.float()
    return float(error.square().sum() / len(error))


def _ours(kind: type[SAE]) -> Callable[[SAEBatch, str], Runner]:
    def build(batch: SAEBatch, mode: str) -> Runner:
        sae = _make(kind, batch)
        given = Batch(batch.x, batch.x if sae.needs_target else None)
        truth = torch.tensor(_exact_error(sae, given), dtype=torch.float64)
        config = TrainConfig(
            total_tokens=batch.shape.n, batch_size=batch.shape.n, lr=LR, eps=EPS, clip_norm=CLIP
        )
        step = FusedStep(_make(kind, batch), config)
        clock = Clock(dict.fromkeys(PARTS, 0.0))

        def run() -> Outputs:
            means = Means()
            dead = step.sae.dead().nonzero().squeeze(-1)
            step([given], step.sae.k, dead, means, clock)
            mse = torch.tensor(means.means()["mse"], dtype=torch.float64)
            return {"mse": mse, "exact": truth}

        return Runner(run)

    return build


def _eager(batch: SAEBatch, mode: str) -> Runner:
    """TopK in plain PyTorch, with tokens x features matrices."""
    sae = _make(TopKSAE, batch)
    truth = torch.tensor(_exact_error(_make(TopKSAE, batch), Batch(batch.x)), dtype=torch.float64)
    config = TrainConfig(
        total_tokens=batch.shape.n, batch_size=batch.shape.n, lr=LR, eps=EPS, clip_norm=CLIP
    )
    step = AutogradStep(sae, config, None, dense_forward)
    clock = Clock(dict.fromkeys(PARTS, 0.0))

    def run() -> Outputs:
        means = Means()
        step([Batch(batch.x)], batch.k, sae.dead().nonzero().squeeze(-1), means, clock)
        mse = torch.tensor(means.means()["mse"], dtype=torch.float64)
        return {"mse": mse, "exact": truth}

    return Runner(run)


def saelens_settings(batch: SAEBatch, architecture: str) -> dict[str, Any]:
    """Of SAELens' training SAE, at the L0 and the levels of ours."""
    if architecture == "jumprelu":
        return {
            "jumprelu_init_threshold": float(_cut(batch)),
            "jumprelu_sparsity_loss_mode": "quadratic",
            "target_l0": batch.k,
            "l0_coefficient": 0.0,
        }
    if architecture == "matryoshka_batchtopk":
        return {"matryoshka_widths": default_widths(batch.shape.f, batch.k, LEVELS)}
    return {}


def _saelens(architecture: str) -> Callable[[SAEBatch, str], Runner]:
    def build(batch: SAEBatch, mode: str) -> Runner:
        settings = saelens_settings(batch, architecture)
        trainer = peers.saelens_trainer(
            batch.weights(), batch.k, LR, batch.shape.n, architecture, settings
        )

        def run() -> Outputs:
            output = trainer.step(batch.x)
            trainer.n_training_steps += 1
            mse = output.losses["mse_loss"]
            mse = mse.detach() if isinstance(mse, torch.Tensor) else torch.tensor(mse)
            return {"mse": mse.double(), "exact": torch.tensor(torch.nan, dtype=torch.float64)}

        return Runner(run)

    return build


def _check(batch: SAEBatch, mode: str, outputs: Outputs, eager: Outputs) -> Verdict:
    exact = float(outputs["exact"])
    if exact != exact:
        # a peer's own selection has no truth here: its step is timed, and judged in `step`
        return Verdict(True, 0.0, 0.0, "")
    error = abs(float(outputs["mse"]) / exact - 1)
    allowed = (batch.k + 32) * torch.finfo(torch.float32).eps
    wrong = "" if error <= allowed else f"mse off by {error:.1e}, allowed {allowed:.1e}"
    return Verdict(not wrong, error, 0.0, wrong)


def _flops(s: Shape, mode: str) -> float:
    return 2 * s.n * s.d * s.f + 8 * s.n * s.k * s.d


_KINDS = (
    BatchTopKSAE,
    JumpReLUSAE,
    MatryoshkaSAE,
    LISTAMatryoshkaSAE,
    GatedSAE,
    ReLUSAE,
    Transcoder,
    SkipTranscoder,
    Crosscoder,
    CrossLayerTranscoder,
)

BENCHMARK = Benchmark(
    name="variants",
    summary="the training step of every SAE variant beside TopK's, at equal L0",
    ops=(),
    modes=("step",),
    shapes={"step": ("S1",)},
    inputs=SAEBatch,
    providers=(
        Provider("ours", _ours(TopKSAE), ours=True, screens=True, devices=(CPU,)),
        *(
            Provider(f"ours:{kind.architecture}", _ours(kind), screens=True, devices=(CPU,))
            for kind in _KINDS
        ),
        Provider("eager", _eager),
        *(
            Provider(f"sae_lens:{name}", _saelens(name), devices=(CPU,))
            for name in ("topk", "batchtopk", "jumprelu", "matryoshka_batchtopk")
        ),
    ),
    check=_check,
    flops=_flops,
    bytes=lambda s, mode, size: (2 * 28 + 4) * s.f * s.d,
    targets=(Target("S1", "step", "sae_lens:topk", 20.0),),
)
