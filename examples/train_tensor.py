# SPDX-License-Identifier: Apache-2.0
"""Train a sparse autoencoder on a tensor of activations.

Any `[tokens, d]` tensor will do. This one is made here, of directions that we know, so that what
was found can be held against what is there.
"""

import torch
from options import options

from mikernels.activations import TensorSource
from mikernels.evaluate import measure_reconstruction
from mikernels.nn import TopKSAE
from mikernels.training import TrainConfig, Trainer

o = options(__doc__, tokens=400_000, features=1_024)

# %% Activations: each token is a sum of 8 of 512 directions. Yours: `torch.load(...)`
random = torch.Generator().manual_seed(0)
truth = torch.nn.functional.normalize(torch.randn(512, 128, generator=random), dim=-1)
which = torch.randint(512, (o.tokens, 8), generator=random)
weights = 1 + torch.rand(o.tokens, 8, generator=random)
activations = torch.nn.functional.embedding_bag(
    which, truth, per_sample_weights=weights, mode="sum"
)
held_out, activations = activations[:4_096], activations[4_096:]

# %% Train: learning rate, warm-up, decay and the revival of dead features are chosen by the run
sae = TopKSAE(d=128, n_features=o.features, k=8)
config = TrainConfig(total_tokens=len(activations), batch_size=4_096)
trainer = Trainer(sae, TensorSource(activations, 4_096), config, quiet=True)
trainer.run()

# %% On tokens that it has not seen
found = measure_reconstruction(sae, held_out)
print(f"variance unexplained {found.fvu:.3f}, L0 {found.l0:.1f}, dead {found.dead_fraction:.1%}")

codes = sae.encode(held_out)  # values and indices [4096, 8], never tokens x features
print(f"codes of {list(codes.values.shape)}, back to {list(sae.decode(codes).shape)}")

# %% What was there, and was found: the feature nearest to each direction
decoder = torch.nn.functional.normalize(sae.w_dec.detach(), dim=-1)
nearest = (truth @ decoder.T).amax(-1)
print(f"of 512 directions, {(nearest > 0.9).sum()} found (cosine above 0.9)")
