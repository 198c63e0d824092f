# SPDX-License-Identifier: Apache-2.0
"""Real inputs without a model hub, and which of them are held out."""

import io

import pytest
import torch
from demo_cases import needs_smollm2
from rich.console import Console

from mikernels.activations import ModelSource
from mikernels.activations.shards import load_rows
from mikernels.demo import data
from mikernels.models.load import load_model


def test_a_missing_package_is_named_with_its_fix():
    with pytest.raises(
        ModuleNotFoundError, match="package no_such_package must be installed; `fix`"
    ):
        data.package_folder("no_such_package", "fix")


def test_python_documentation_is_real_text():
    documents = data.python_documentation()
    assert sum(map(len, documents)) > 300_000
    assert documents == data.python_documentation()
    assert documents != data.python_documentation(seed=1)


def test_held_out_rows_are_a_tenth_in_whole_windows():
    rows = {"activations": torch.zeros(600, 2), "windows": torch.arange(600) // 20}
    held = data.held_out(rows, seed=3)
    assert held.sum() == 60 and torch.equal(held, data.held_out(rows, seed=3))
    assert not torch.equal(held, data.held_out(rows, seed=4))
    assert (held.view(30, 20).all(1) | ~held.view(30, 20).any(1)).all()
    alone = data.held_out({"activations": torch.zeros(50, 2)}, seed=0)
    assert alone.sum() == 5


@pytest.fixture(scope="module")
def smollm2():
    return load_model(data.smollm2_folder())


@pytest.mark.model
@needs_smollm2
def test_smollm2_activations_are_those_of_the_model(smollm2):
    model, tokenizer = smollm2
    text = ["The capital of France is Paris, and the capital of Italy is Rome."]
    source = ModelSource(model, tokenizer, 14, text, batch_size=4)
    rows = next(source.read())
    with torch.no_grad():
        ids = torch.tensor([tokenizer(text[0])["input_ids"]])
        hidden = model(ids, output_hidden_states=True).hidden_states[15][0]
    assert tokenizer.decode(rows["token_ids"]) == text[0].removeprefix("The")
    assert torch.allclose(rows["activations"], hidden[1:], atol=1e-2)
    # the attention sink of the first position would dominate every loss
    assert hidden[0].norm() > 50 * rows["activations"].norm(dim=-1).max()


@pytest.mark.model
@needs_smollm2
def test_smollm2_shards_are_collected_once(smollm2, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(data, "load_model", lambda folder: calls.append(folder) or smollm2)
    console = Console(file=io.StringIO())
    folders = [data.smollm2_shards(tmp_path, 3, 300, 0, console) for _ in range(2)]
    assert folders[0] == folders[1]
    assert len(calls) == 1
    rows, metadata = load_rows(folders[0])
    assert 290 < rows["activations"].shape[0] < 300
    assert rows["activations"].shape[1] == 576
    assert all(str(token) in metadata["pieces"] for token in rows["token_ids"].tolist())
