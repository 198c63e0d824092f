# SPDX-License-Identifier: Apache-2.0
"""Every variant of SAE, small, and batches that it takes."""

from __future__ import annotations

import torch
from oracle import randn

from mikernels.activations import TensorSource
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
from mikernels.training import TrainConfig, Trainer
from mikernels.values.batch import Batch

D, F, K, BATCH = 16, 96, 4, 64
LAYERS = 4
WIDTHS = (8, 24, 48, F)
JUMP = dict(bandwidth=0.3, initial_l0=12)

VARIANTS: dict[str, tuple[type[SAE], dict]] = {
    "topk": (TopKSAE, dict(k=K)),
    "batch_topk": (BatchTopKSAE, dict(k=4.5)),
    "jumprelu": (JumpReLUSAE, dict(target_l0=6, **JUMP)),
    "jumprelu, step": (JumpReLUSAE, dict(sparsity="step", l0_coefficient=0.05, **JUMP)),
    "jumprelu, tanh": (
        JumpReLUSAE,
        dict(sparsity="tanh", l0_coefficient=0.1, ste_to_input=True, **JUMP),
    ),
    "jumprelu, free norms": (
        JumpReLUSAE,
        dict(
            sparsity="tanh",
            l0_coefficient=0.1,
            normalize_decoder=False,
            pre_act_coefficient=3e-3,
            **JUMP,
        ),
    ),
    "matryoshka": (MatryoshkaSAE, dict(k=4.5, widths=WIDTHS)),
    "matryoshka, aux by level": (
        MatryoshkaSAE,
        dict(k=4, widths=WIDTHS, aux_by_level=True, level_weights=(1, 0.5, 0, 2)),
    ),
    "matryoshka, detached, by frequency": (
        MatryoshkaSAE,
        dict(k=4, widths=WIDTHS, detach=True, by_frequency=True),
    ),
    "lista_matryoshka": (LISTAMatryoshkaSAE, dict(k=4, widths=WIDTHS)),
    "lista_matryoshka, twice": (
        LISTAMatryoshkaSAE,
        dict(k=4, widths=(F,), iterations=2, eta=0.2),
    ),
    "gated": (GatedSAE, dict(l1_coefficient=0.1, initial_l0=12)),
    "gated, free": (
        GatedSAE,
        dict(l1_coefficient=0.1, initial_l0=12, frozen_decoder=False, normalize_decoder=False),
    ),
    "relu": (ReLUSAE, dict(l1_coefficient=0.2, l0_coefficient=0.05, initial_l0=12)),
    "relu, free norms": (
        ReLUSAE,
        dict(l1_coefficient=0.2, initial_l0=12, normalize_decoder=False),
    ),
    "transcoder": (Transcoder, dict(k=4, d_out=20)),
    "transcoder, unit": (Transcoder, dict(k=4, normalize_decoder=True)),
    "skip_transcoder": (SkipTranscoder, dict(k=4, d_out=11)),
    "crosscoder": (Crosscoder, dict(k=4, n_layers=LAYERS)),
    "cross_layer_transcoder": (
        CrossLayerTranscoder,
        dict(k=2, n_layers=LAYERS, d_out=3 * LAYERS),
    ),
}


def make(name: str, **settings) -> SAE:
    kind, own = VARIANTS[name]
    settings = {"dead_after": 300, "k_aux": 5, **own, **settings}
    return kind(D, F, generator=torch.Generator().manual_seed(0), **settings)


def activations(n: int = 1024, seed: int = 1) -> torch.Tensor:
    directions = randn(2 * D, D, seed=seed)
    amounts = randn(n, 2 * D, seed=seed + 1).relu() * (randn(n, 2 * D, seed=seed + 3) > 1.3)
    return amounts @ directions + 0.01 * randn(n, D, seed=seed + 2) + 2


def batch_of(sae: SAE, n: int = BATCH, seed: int = 1, weighted: bool = False) -> Batch:
    x = activations(n, seed)
    target = None
    if sae.needs_target:
        mixed = torch.tanh(x @ randn(D, sae.config.d_out, seed=11)) + x[:, :1]
        target = mixed
    weights = torch.arange(n) % 3 + 0.5 if weighted else None
    return Batch(x, target, weights)


def source_of(sae: SAE, n: int = 1024) -> TensorSource:
    """Shuffled batches of a variant's inputs and targets."""
    whole = batch_of(sae, n)
    return TensorSource(whole.input, BATCH, target=whole.target)


def train(sae: SAE, steps: int = 20, out_dir=None, **settings):
    config = TrainConfig(
        **{"total_tokens": steps * BATCH, "batch_size": BATCH, "lr": 3e-3, "log_every": 1}
        | settings
    )
    trainer = Trainer(sae, source_of(sae), config, quiet=True, out_dir=out_dir)
    return trainer, trainer.run()
