# SPDX-License-Identifier: Apache-2.0
"""dictionary_learning's own trainer on SmolLM2 activations, accelerated by one line.

python examples/train_dictionary_learning.py            # accelerated
python examples/train_dictionary_learning.py --plain    # as it is
"""

from __future__ import annotations

import time

from activations import K, arguments, batches, tell
from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer

import mikernels

options = arguments("dictionary_learning's BatchTopK SAE on SmolLM2 activations")
data = batches(options)
d = next(data).shape[-1]

trainer = BatchTopKTrainer(
    steps=options.steps,
    activation_dim=d,
    dict_size=options.features,
    k=K,
    layer=14,
    lm_name="SmolLM2-135M",
    warmup_steps=1,
    device="cpu",
)

if not options.plain:
    report = mikernels.accelerate(trainer, optimizer=True)

losses: list[float] = []
began = time.perf_counter()
# step 0 asks for a geometric median that this release's BatchTopKTrainer lacks
for step in range(1, options.steps + 1):
    losses.append(trainer.update(step, next(data)))

if not options.plain:
    print(report)
    report.restore()
tell("dictionary_learning, " + ("as it is" if options.plain else "accelerated"), losses, began)
