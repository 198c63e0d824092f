# SPDX-License-Identifier: Apache-2.0
"""sparsify's SparseCoder on SmolLM2 activations, accelerated by one line.

    python examples/train_sparsify.py            # accelerated
    python examples/train_sparsify.py --plain    # as it is

The loop is the body of its Trainer.fit; `mikernels.accelerate(trainer)` takes the Trainer too.
"""

from __future__ import annotations

import time

import torch
from activations import K, arguments, batches, tell
from sparsify import SparseCoder
from sparsify.config import SparseCoderConfig

import mikernels

options = arguments("sparsify's SparseCoder on SmolLM2 activations")
data = batches(options)
d = next(data).shape[-1]

sae = SparseCoder(d, SparseCoderConfig(num_latents=options.features, k=K))
optimizer = torch.optim.Adam(sae.parameters(), lr=3e-4)

if not options.plain:
    report = mikernels.accelerate(sae)

losses: list[float] = []
began = time.perf_counter()
for _ in range(options.steps):
    sae.set_decoder_norm_to_unit_norm()
    output = sae(next(data))
    output.fvu.backward()
    sae.remove_gradient_parallel_to_decoder_directions()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(float(output.fvu.detach()))

if not options.plain:
    print(report)
    report.restore()
tell("sparsify (FVU), " + ("as it is" if options.plain else "accelerated"), losses, began)
