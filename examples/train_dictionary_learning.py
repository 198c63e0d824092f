# SPDX-License-Identifier: Apache-2.0
"""dictionary_learning's own trainer on SmolLM2 activations, accelerated by one line.

python examples/train_dictionary_learning.py            # accelerated
python examples/train_dictionary_learning.py --plain    # as it is
"""

import time

from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
from options import options
from smollm2 import K, batches, tell

import mikernels

o = options(__doc__, steps=60, tokens=16_384, features=9_216, plain=False)

# %% Activations of norm about sqrt(d), without end
data = batches(o.tokens)
d = next(data).shape[-1]

# %% As the library has it
trainer = BatchTopKTrainer(
    steps=o.steps,
    activation_dim=d,
    dict_size=o.features,
    k=K,
    layer=14,
    lm_name="SmolLM2-135M",
    warmup_steps=1,
    device="cpu",
)

# %% One line makes it faster
if not o.plain:
    report = mikernels.accelerate(trainer, optimizer=True)

# %% Train
losses: list[float] = []
began = time.perf_counter()
# step 0 asks for a geometric median that this release's BatchTopKTrainer lacks
for step in range(1, o.steps + 1):
    losses.append(trainer.update(step, next(data)))

if not o.plain:
    print(report)
    report.restore()
tell("dictionary_learning, " + ("as it is" if o.plain else "accelerated"), losses, began)
