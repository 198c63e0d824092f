# SPDX-License-Identifier: Apache-2.0
"""Inner products of per-sample gradients of a linear layer."""

from __future__ import annotations

import torch

import mikernels

from ..harness.pairs import against, operands, runs
from ..harness.spec import Benchmark


def _make(s, randn):
    return {"acts": randn(s.n, s.d), "grads": randn(s.n, s.d)}


def _formed(x):
    flat = torch.einsum("ne,nd->ned", x.grads, x.acts).reshape(len(x.acts), -1)
    return flat @ flat.T


def _products(x):
    return (x.acts @ x.acts.T) * (x.grads @ x.grads.T)


BENCHMARK = Benchmark(
    name="grad_gram",
    summary="<grad_i, grad_j> from activations and output gradients",
    ops=("gram_products_",),
    modes=("fwd",),
    shapes={"fwd": ("samples",)},
    gpu_shapes={"fwd": ("samples",)},
    inputs=operands(_make),
    providers=(
        runs("ours", lambda x: mikernels.grad_gram(x.acts, x.grads), ours=True),
        runs("eager", _formed),
        runs("two products", _products),
    ),
    check=against(_products),
    # one side: half of two products
    flops=lambda s, mode: 2.0 * s.n * s.n * s.d,
    bytes=lambda s, mode, size: size * (2 * s.n * s.d + s.n * s.n),
    family="pairs",
)
