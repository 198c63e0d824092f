# SPDX-License-Identifier: Apache-2.0
"""Sparse probes: the activations that sae-probes gets, and what is made of its numbers."""

import importlib.util
import json
import sys
import types

import pytest
import torch
from decoder_cases import Characters, hooks_of, tiny

from mikernels.evaluate import probes
from mikernels.nn import TopKSAE

D, LAYER = 24, 1
PROMPTS = {
    "1_letters": [chr(97 + i % 3) * (1 + i % 7) for i in range(40)],
    "2_other": [chr(97 + i % 5) * (1 + i % 4) + "z" for i in range(30)],
}


@pytest.fixture
def judge(monkeypatch):
    """sae-probes as far as it is called, which records what it was given."""
    seen = []

    def run_sae_evals(sae, *, model_name, hook_name, model_cache_path, datasets, ks, **more):
        from pathlib import Path

        for number, dataset in enumerate(datasets):
            folder = Path(model_cache_path) / f"model_activations_{model_name}"
            rows = torch.load(folder / f"{dataset}_{hook_name}.pt", weights_only=True)
            acts = sae.encode(rows)
            seen.append((dataset, rows, acts, more))
            lines = [
                {"dataset": dataset, "k": k, "test_auc": 0.5 + acts.shape[1] / 1000 + number / 100}
                for k in ks
            ]
            (Path(more["results_path"]) / f"{dataset}.json").write_text(json.dumps(lines))
            print("noise")

    package = types.ModuleType("sae_probes")
    package.__spec__ = importlib.util.spec_from_loader("sae_probes", None)
    package.DATASETS, package.run_sae_evals = list(PROMPTS), run_sae_evals
    data = types.ModuleType("sae_probes.utils_data")
    data.read_numbered_dataset_df = lambda name: {"prompt": PROMPTS[name]}
    monkeypatch.setitem(sys.modules, "sae_probes", package)
    monkeypatch.setitem(sys.modules, "sae_probes.utils_data", data)
    return seen


def measure(model, sae, cache, layer=LAYER, **options):
    options = {"datasets": PROMPTS, "ks": (1, 2), "resamples": 50, "name": "tiny", **options}
    return probes.measure_probes(model, Characters(), layer, sae, cache, **options)


def test_activations_are_those_of_each_prompt_alone(judge, tmp_path, capsys):
    model, sae = tiny("llama", torch.float32).train(), TopKSAE(D, 60, 4)
    found = measure(model, sae, tmp_path)
    assert capsys.readouterr() == ("", "") and hooks_of(model) == 0 and model.training
    assert [dataset for dataset, *_ in judge] == list(PROMPTS) * 3
    model.eval()
    for dataset, rows, acts, more in judge[:2]:
        for prompt, row in zip(PROMPTS[dataset], rows, strict=True):
            ids = torch.tensor([Characters()(prompt)["input_ids"]])
            with torch.no_grad():
                states = model.model(input_ids=ids, output_hidden_states=True).hidden_states
            torch.testing.assert_close(row, states[LAYER + 1][0, -1], rtol=1e-4, atol=1e-5)
        assert torch.equal(acts, sae.encode(rows).to_dense().detach())
        assert more["device"] == "cpu"
    # the random SAE is another of as many features; the activations themselves
    assert judge[2][2].shape == judge[0][2].shape and not torch.equal(judge[2][2], judge[0][2])
    assert torch.equal(judge[4][1], judge[4][2])
    assert found.auc["sae"][1].value == pytest.approx(0.565)
    assert found.raw_all.value == found.auc["raw"][2].value == pytest.approx(0.529)
    assert found.gain[1].value == 0 and not found.told_apart(1)
    text = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert text["by_dataset"]["sae"]["2_other"]["1"] == pytest.approx(0.57)


def test_activations_are_collected_once(judge, tmp_path):
    model, said = tiny("llama", torch.float32), []
    first = measure(model, TopKSAE(D, 60, 4), tmp_path, progress=said.append)
    assert len(said) == 2 + 3
    model.forward = None  # is not asked again
    second = measure(model, TopKSAE(D, 60, 4), tmp_path, progress=said.append)
    assert len(said) == 2 + 3 + 3 and first.to_dict() == second.to_dict()


def test_bad_input_is_refused(judge, tmp_path):
    model = tiny("llama", torch.float32)
    with pytest.raises(ValueError, match=r"among the 2 of sae-probes, got \['3'\]"):
        measure(model, TopKSAE(D, 60, 4), tmp_path, datasets=["3"])
    with pytest.raises(ValueError, match="sae must be of width 24 like layer 1"):
        measure(model, TopKSAE(8, 60, 4), tmp_path)
    with pytest.raises(IndexError, match=r"^measure_probes: layer must be in 0\.\.2"):
        measure(model, TopKSAE(D, 60, 4), tmp_path, layer=5)


def test_without_the_extra_the_fix_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(probes.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'mikernels\[probes\]'"):
        measure(tiny("llama", torch.float32), TopKSAE(D, 60, 4), tmp_path)


@pytest.mark.peers
@pytest.mark.skipif(importlib.util.find_spec("sae_probes") is None, reason="needs sae-probes")
def test_sae_probes_runs_offline_on_activations_of_any_model(tmp_path):
    model, name = tiny("llama", torch.float32), "117_us_state_FL"
    tokenizer = type("Few", (Characters,), {"__call__": _few})()
    found = probes.measure_probes(
        model, tokenizer, LAYER, TopKSAE(D, 60, 8), tmp_path, name="tiny", datasets=[name]
    )
    assert all(0.3 < found.auc[source][16].value < 1 for source in probes.SOURCES)
    # a random model of letters knows something of names, and all coordinates no less than one
    assert found.raw_all.value > 0.5


def _few(self, text, **options):
    return {"input_ids": [2 + ord(c) % 48 for c in text]}
