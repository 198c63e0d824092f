# SPDX-License-Identifier: Apache-2.0
"""sparsify's SparseCoder on SmolLM2 activations, accelerated by one line.

    python examples/train_sparsify.py            # accelerated
    python examples/train_sparsify.py --plain    # as it is

The loop is the body of its Trainer.fit; `mikernels.accelerate(trainer)` takes the Trainer too.
"""

import time

import torch
from options import options
from smollm2 import K, batches, tell
from sparsify import SparseCoder
from sparsify.config import SparseCoderConfig

import mikernels

o = options(__doc__, steps=60, tokens=16_384, features=9_216, plain=False)

# %% Activations of norm about sqrt(d), without end
data = batches(o.tokens)
d = next(data).shape[-1]

# %% As the library has it
sae = SparseCoder(d, SparseCoderConfig(num_latents=o.features, k=K))
optimizer = torch.optim.Adam(sae.parameters(), lr=3e-4)

# %% One line makes it faster
if not o.plain:
    report = mikernels.accelerate(sae)

# %% Train
losses: list[float] = []
began = time.perf_counter()
for _ in range(o.steps):
    sae.set_decoder_norm_to_unit_norm()
    output = sae(next(data))
    output.fvu.backward()
    sae.remove_gradient_parallel_to_decoder_directions()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(float(output.fvu.detach()))

if not o.plain:
    print(report)
    report.restore()
tell("sparsify (FVU), " + ("as it is" if o.plain else "accelerated"), losses, began)
