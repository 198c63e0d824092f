# SPDX-License-Identifier: Apache-2.0
"""Look at features: every feature of an SAE, as pages that open from a folder.

For each: the texts on which it is most active, and some on which it is less; how strong it is and
how often; the tokens that it promotes; the features that are most like it.
"""

from options import options
from smollm2 import LAYER, OUT, smollm2, trained_sae

from mikernels.activations import ModelSource
from mikernels.demo.data import python_documentation
from mikernels.report import collect_features, write_report

o = options(__doc__, tokens=16_000)

# %% The SAE of train_text.py, and text for it to read
sae = trained_sae()
model, tokenizer = smollm2()
texts = python_documentation()[-20:]
source = ModelSource(model, tokenizer, LAYER, texts, max_tokens=o.tokens)

# %% One pass over the text
features = collect_features(sae, source.read(), tokenizer, model=model)
never = int((features.counts == 0).sum())
print(f"{features.n_features:,} features on {features.n_rows:,} tokens, {never:,} never active")

# %% What is known of one: of those active on less than a hundredth of the tokens the strongest
often = features.counts > features.n_rows / 100
one = features.view(int(features.maxima.masked_fill(often, 0).argmax()))
print(f"feature {one.number}: on {one.count} tokens, up to {one.maximum:.1f}, mean {one.mean:.1f}")
for example in one.examples[:3]:
    print(f"{example.value:6.1f} at {example.tokens[example.peak]!r}: {''.join(example.tokens)!r}")
print("promotes", *(repr(token) for token, _ in one.promoted[:4]))
print("is like", *(f"{number} ({cosine:+.2f})" for number, cosine in one.similar[:3]))

# %% All of them: search, sort and filter, without a server
page = write_report(features, OUT / "report", title=f"SmolLM2-135M, layer {LAYER}")
print("wrote", page)

# %% The same from a shell, with what the SAE explains beside it:
# mikernels report out/examples/sae --model FOLDER --text my.txt
