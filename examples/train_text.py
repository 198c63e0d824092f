# SPDX-License-Identifier: Apache-2.0
"""Train a sparse autoencoder on a layer of a language model, from text.

The model reads the text once, and its activations are kept on disk, where any number of runs may
read them. Both are there without a network: SmolLM2-135M, and Python's own documentation.
"""

import shutil

from options import options
from smollm2 import BATCH, LAYER, OUT, K, smollm2

from mikernels.activations import ModelSource, ShardSource, write_shards
from mikernels.demo.data import python_documentation
from mikernels.nn import BatchTopKSAE
from mikernels.training import TrainConfig, Trainer

o = options(__doc__, tokens=40_000, features=4_608, steps=120)

# %% A model and documents. Yours: a list of texts, or `TextFiles(["my.txt"])`
model, tokenizer = smollm2()
documents = python_documentation()
train, held_out = documents[:-20], documents[-20:]

# %% Its activations: the residual stream after layer 14, without each window's first token
source = ModelSource(model, tokenizer, LAYER, train, max_tokens=o.tokens)
for folder in ("activations", "sae"):  # of an earlier call
    shutil.rmtree(OUT / folder, ignore_errors=True)
rows = write_shards(OUT / "activations", source.read())
print(f"{rows:,} activations of width {source.d} from {source.read_tokens:,} tokens")

# %% Train, with checkpoints and metrics in a folder: `Trainer.resume` goes on from there
sae = BatchTopKSAE(source.d, o.features, k=K)
config = TrainConfig(total_tokens=o.steps * BATCH, batch_size=BATCH, log_every=o.steps // 4)
shards = ShardSource(OUT / "activations", batch_size=BATCH)
trainer = Trainer(sae, shards, config, out_dir=OUT / "sae", quiet=True)
history = trainer.run()
for row in history.rows:
    print(
        f"step {row['step']:>4}: variance unexplained {row['fvu']:.3f}, L0 {row['l0']:.1f}, "
        f"dead {row['dead_fraction']:.1%}"
    )

# %% The same run, from a shell:
# mikernels train --model FOLDER --layer 14 --text my.txt --arch batch_topk --tokens 10M --out sae
