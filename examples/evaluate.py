# SPDX-License-Identifier: Apache-2.0
"""How good is an SAE? What it explains of text that it has not seen, and what its model loses.

The reconstruction takes the place of the layer's output, and the language model's loss says how
much was lost: 1 is a perfect SAE, 0 one that is no better than the mean activation. Beside it: an
SAE that has learned nothing.
"""

from options import options
from smollm2 import LAYER, smollm2, trained_sae

from mikernels.activations.windows import token_windows
from mikernels.demo.data import python_documentation
from mikernels.evaluate import measure_spliced

o = options(__doc__, tokens=4_096)

# %% The SAE of train_text.py, and the documents that it was not trained on
sae = trained_sae()
model, tokenizer = smollm2()
held_out = python_documentation()[-20:]
windows = list(token_windows(tokenizer, held_out, 256, max_tokens=o.tokens))

# %% The model reads them five times: as it is, and with four things in the layer's place
found = measure_spliced(model, LAYER, windows, sae, special_ids=tokenizer.all_special_ids)
print(f"{found.predictions:,} predictions, {found.windows} windows, 95 % intervals over them")
print(f"{'in the place of the layer':>26}  nats")
for name, loss in found.losses.items():
    print(f"{name:>26}  {loss:.3f}")

for name, one, recovered in (
    ("SAE", found.reconstruction, found.recovered),
    ("random SAE", found.random_reconstruction, found.random_recovered),
):
    print(
        f"{name}: variance unexplained {one.fvu:.3f}, L0 {one.l0:.1f}, "
        f"never active {one.dead_fraction:.1%}, loss recovered {recovered}"
    )

# %% The same from a shell, also for an SAE of SAELens:
# mikernels eval out/examples/sae --model FOLDER --layer 14 --text unseen.txt --json found.json
