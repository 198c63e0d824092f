# SPDX-License-Identifier: Apache-2.0
"""An SAE as a folder that SAELens reads, and SAELens' as ours: both compute the same."""

import importlib.util

import torch
from options import options
from smollm2 import LAYER, OUT, smollm2, trained_sae

from mikernels.activations import ModelSource
from mikernels.demo.data import python_documentation
from mikernels.integrations.saelens import export_sae, load_sae

o = options(__doc__, tokens=2_048)

# %% The SAE of train_text.py, and some activations to try it on
sae = trained_sae()
model, tokenizer = smollm2()
source = ModelSource(model, tokenizer, LAYER, python_documentation()[-20:], max_tokens=o.tokens)
x = next(source.read())["activations"]

# %% Write it: a BatchTopK SAE is used by its threshold, which SAELens calls "jumprelu"
folder = OUT / "saelens"
export_sae(
    sae,
    folder,
    model_name="HuggingFaceTB/SmolLM2-135M",
    hook_name=f"blocks.{LAYER}.hook_resid_post",
)
print("wrote", *sorted(path.name for path in folder.glob("*.*")))

# %% Read by SAELens
if importlib.util.find_spec("sae_lens"):
    from sae_lens import SAE

    theirs = SAE.load_from_disk(str(folder))
    with torch.no_grad():
        off = (theirs(x) - sae.reconstruct(x)).norm() / x.norm()
    print(f"SAELens: {theirs.cfg.architecture()}, reconstructions off by {off:.0e} of their norm")

# %% And back, as from any folder of SAELens
again = load_sae(folder)
same = torch.equal(again.reconstruct(x), sae.reconstruct(x))
print(f"{type(again).__name__}, the same bits: {same}")
