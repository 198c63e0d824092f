# SPDX-License-Identifier: Apache-2.0
"""What is exported is what Neuronpedia's tables take, and says what the views say."""

import gzip
import json
import os

import pytest
from demo_cases import token_data

from mikernels.report import collect_features, neuronpedia

# of apps/webapp/prisma/schema.prisma in hijohnnylin/neuronpedia: columns without a default, and
# those of others that are known of
TEXTS, NUMBERS, COUNTS = [str], [float, int], [int]
TABLES = {
    "release": (
        {"name": str, "description": str, "creatorName": str, "creatorId": str, "urls": TEXTS},
        {"visibility": str, "descriptionShort": str, "creatorNameShort": str},
    ),
    "model": (
        {"id": str, "creatorId": str, "layers": int, "neuronsPerLayer": int, "owner": str},
        {"displayNameShort": str, "displayName": str, "visibility": str},
    ),
    "sourceset": (
        {"modelId": str, "name": str, "description": str, "creatorName": str, "creatorId": str}
        | {"urls": TEXTS},
        {"visibility": str, "releaseName": str},
    ),
    "source": (
        {"id": str, "modelId": str, "setName": str, "creatorId": str},
        {"visibility": str, "num_prompts": int, "num_tokens_in_prompt": int, "dataset": str}
        | {"hfRepoId": str, "hfFolderId": str},
    ),
    "features": (
        {"modelId": str, "layer": str, "index": str},
        {"sourceSetName": str, "creatorId": str, "maxActApprox": float, "frac_nonzero": float}
        | {"topkCosSimIndices": COUNTS, "topkCosSimValues": NUMBERS, "neg_str": TEXTS}
        | {"neg_values": NUMBERS, "pos_str": TEXTS, "pos_values": NUMBERS}
        | {"freq_hist_data_bar_heights": NUMBERS, "freq_hist_data_bar_values": NUMBERS},
    ),
    "activations": (
        {"id": str, "tokens": TEXTS, "index": str, "layer": str, "modelId": str, "maxValue": float}
        | {"maxValueTokenIndex": int, "minValue": float, "values": NUMBERS, "creatorId": str},
        {"binMin": float, "binMax": float, "binContains": float, "qualifyingTokenIndex": int},
    ),
}
SOURCE = neuronpedia.Source(
    "a-model", 3, "res-12", "user", "Somebody", "release-1", "A title", "Features", n_prompts=20
)


def check(row, table):
    required, more = TABLES[table]
    assert required.keys() <= row.keys() <= required.keys() | more.keys()
    for name, kind in (required | more).items():
        if isinstance(kind, list):
            assert all(type(value) in kind for value in row.get(name, []))
        elif name in row:
            assert type(row[name]) is kind, (name, row[name])


def lines(path):
    data = path.read_bytes()
    text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")
    assert text.endswith("\n")
    return [json.loads(line) for line in text.rstrip("\n").split("\n")]


@pytest.fixture(scope="module")
def features():
    sae, rows, pieces = token_data()
    rows["activations"][rows["token_ids"] == 4] = 0
    pieces |= {"2": "\u2028\x00\ufffd", "3": '"\\\n'}
    return collect_features(sae, [rows], pieces, examples=3)


def test_the_files_are_what_the_tables_take(features, tmp_path):
    out = neuronpedia.export(features, tmp_path, SOURCE, batch=4)
    assert out == tmp_path / "a-model" / "3-res-12" and os.listdir(out.parent) == [out.name]
    for table in ("release", "model", "sourceset", "source"):
        (row,) = lines(out / f"{table}.jsonl")
        check(row, table)
    assert row["num_prompts"] == 20 and "dataset" not in row
    neurons, activations = (
        [row for n in range(3) for row in lines(out / part / f"batch-{n}.jsonl.gz")]
        for part in ("features", "activations")
    )
    for rows, table in ((neurons, "features"), (activations, "activations")):
        for row in rows:
            check(row, table)
            assert row.keys() == rows[0].keys() and row["layer"] == "3-res-12"
    assert len({row["id"] for row in activations}) == len(activations) > 50
    assert [row["index"] for row in neurons] == [str(f) for f in range(12)]
    dead = neurons[4]
    assert not dead["frac_nonzero"] and not dead["freq_hist_data_bar_values"]
    left = iter(activations)
    for view, neuron in zip(features.views(0, 12), neurons, strict=True):
        assert neuron["maxActApprox"] == pytest.approx(view.maximum, rel=1e-5)
        assert neuron["frac_nonzero"] == view.count / 600
        assert sum(neuron["freq_hist_data_bar_heights"]) == view.count
        assert neuron["topkCosSimIndices"] == [other for other, _ in view.similar]
        for example in view.examples + view.samples:
            row = next(left)
            assert row["index"] == neuron["index"] and row["tokens"] == example.tokens
            assert row["values"] == pytest.approx(example.scores, rel=1e-5)
            assert row["maxValue"] == row["values"][row["maxValueTokenIndex"]] == max(row["values"])
            if example in view.examples:
                assert (row["binMin"], row["binContains"]) == (-1, -1)
                continue
            assert row["binMin"] < example.value <= row["binMax"] * (1 + 1e-5)
            values = features.firing.of(view.number)[1].tolist()
            held = sum(row["binMin"] < v / (1 + 1e-5) <= row["binMax"] for v in values)
            assert row["binContains"] == held / 600
    assert next(left, None) is None


def test_the_same_features_make_the_same_files_and_nothing_is_overwritten(features, tmp_path):
    first, second = (neuronpedia.export(features, tmp_path / part, SOURCE) for part in "ab")
    for path in first.rglob("*.*"):
        assert path.read_bytes() == (second / path.relative_to(first)).read_bytes()
    with pytest.raises(FileExistsError, match="export: folder must hold no a-model/3-res-12 yet"):
        neuronpedia.export(features, tmp_path / "a", SOURCE)


def test_an_export_that_fails_leaves_nothing(features, tmp_path, monkeypatch):
    def interrupted(path, data):
        raise KeyboardInterrupt

    monkeypatch.setattr(neuronpedia, "write_atomic", interrupted)
    with pytest.raises(KeyboardInterrupt):
        neuronpedia.export(features, tmp_path, SOURCE)
    assert os.listdir(tmp_path / "a-model") == []


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model": "a/b"}, "model must be letters"),
        ({"set": "res__x"}, "set must be letters"),
        ({"creator_id": " "}, "creator_id must be a text"),
        ({"layer": -1}, "layer must be 0 or more"),
    ],
)
def test_a_source_that_cannot_be(change, message):
    given = {name: getattr(SOURCE, name) for name in SOURCE.__dataclass_fields__}
    with pytest.raises(ValueError, match=f"neuronpedia.Source: {message}"):
        neuronpedia.Source(**given | change)
