# SPDX-License-Identifier: Apache-2.0
"""SAELens' own trainer on SmolLM2 activations, accelerated by one line.

python examples/train_saelens.py            # accelerated
python examples/train_saelens.py --plain    # as it is
"""

from __future__ import annotations

import time

from activations import BATCH, K, arguments, batches, tell
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.training.sae_trainer import SAETrainer

import mikernels

options = arguments("SAELens' TopK SAE on SmolLM2 activations")
data = batches(options)
d = next(data).shape[-1]

sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=d, d_sae=options.features, k=K))
config = SAETrainerConfig(
    total_training_samples=options.steps * BATCH,
    train_batch_size_samples=BATCH,
    lr=3e-4,
    lr_end=3e-4,
    device="cpu",
)
trainer = SAETrainer(config, sae, data)

if not options.plain:
    report = mikernels.accelerate(trainer, optimizer=True)

losses: list[float] = []
began = time.perf_counter()
for _ in range(options.steps):
    losses.append(float(trainer.step(next(data)).loss.detach()))
    trainer.n_training_steps += 1

if not options.plain:
    print(report)
    report.restore()
tell("SAELens, " + ("as it is" if options.plain else "accelerated"), losses, began)
