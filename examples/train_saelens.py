# SPDX-License-Identifier: Apache-2.0
"""SAELens' own trainer on SmolLM2 activations, accelerated by one line.

python examples/train_saelens.py            # accelerated
python examples/train_saelens.py --plain    # as it is
"""

import time

from options import options
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.training.sae_trainer import SAETrainer
from smollm2 import BATCH, K, batches, tell

import mikernels

o = options(__doc__, steps=60, tokens=16_384, features=9_216, plain=False)

# %% Activations of norm about sqrt(d), without end
data = batches(o.tokens)
d = next(data).shape[-1]

# %% As the library has it
sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=d, d_sae=o.features, k=K))
config = SAETrainerConfig(
    total_training_samples=o.steps * BATCH,
    train_batch_size_samples=BATCH,
    lr=3e-4,
    lr_end=3e-4,
    device="cpu",
)
trainer = SAETrainer(config, sae, data)

# %% One line makes it faster
if not o.plain:
    report = mikernels.accelerate(trainer, optimizer=True)

# %% Train
losses: list[float] = []
began = time.perf_counter()
for _ in range(o.steps):
    losses.append(float(trainer.step(next(data)).loss.detach()))
    trainer.n_training_steps += 1

if not o.plain:
    print(report)
    report.restore()
tell("SAELens, " + ("as it is" if o.plain else "accelerated"), losses, began)
