# SPDX-License-Identifier: Apache-2.0
"""Faithfulness curves, the smallest circuit, and models in the order of it."""

import json

import numpy as np
import pytest
import torch
from decoder_cases import made

from mikernels.circuits import find_circuit
from mikernels.circuits.faithfulness import MIB, Curve, faithfulness_curve, random_circuit
from mikernels.circuits.minimal import _Search, minimal_circuit, rank_models
from mikernels.circuits.patching import Patcher
from mikernels.circuits.tasks import Task

CLEAN = torch.tensor([[3, 14, 15, 9, 2], [6, 5, 35, 8, 9], [11, 2, 40, 8, 1], [4, 4, 7, 30, 2]])
OTHER = torch.tensor([[3, 17, 15, 21, 2], [6, 5, 33, 8, 4], [12, 2, 40, 8, 3], [4, 9, 7, 31, 2]])
PAIR = (7, 9)
GIVEN = CLEAN, OTHER, PAIR


def curve(**changed):
    generator = torch.Generator().manual_seed(0)
    given = {
        "method": "gim", "level": "edge", "label": "logit of 7", "fractions": MIB,
        "sizes": tuple(int(1000 * x) for x in MIB),
        "clean": torch.rand(6, generator=generator).double() + 2,
        "empty": torch.rand(6, generator=generator).double(),
        "values": 3 * torch.rand(10, 6, generator=generator).double(),
    }  # fmt: skip
    return Curve(**{**given, **changed})


def test_the_curve_is_mibs():
    found = curve()
    f = (found.values.mean(1) - found.empty.mean()) / (found.clean.mean() - found.empty.mean())
    f = f.tolist()
    cpr = cmd = 0.0
    for i in range(9):
        width = MIB[i + 1] - MIB[i]
        cpr += width * (f[i] + f[i + 1]) / 2
        cmd += width * (abs(1 - f[i]) + abs(1 - f[i + 1])) / 2
    assert [one.value for one in found.faithfulness] == pytest.approx(f, abs=1e-12)
    assert (found.cpr.value, found.cmd.value) == pytest.approx((cpr, cmd), abs=1e-12)
    # the interval is that of all three means over the same resampled prompts
    drawn = np.random.default_rng(0).integers(0, 6, (64, 6))
    drawn = np.concatenate([drawn, *_more()])
    clean, empty, values = (x.numpy() for x in (found.clean, found.empty, found.values[4]))
    means = [x[drawn].mean(1) for x in (values, clean, empty)]
    ratio = (means[0] - means[2]) / (means[1] - means[2])
    low, high = np.quantile(ratio, [0.025, 0.975])
    assert found.faithfulness[4][1:] == pytest.approx((low, high), abs=1e-12)
    assert "CPR " in str(found) and "0.1 %      1" in str(found)
    assert json.loads(json.dumps(found.to_dict()))["cpr"]["value"] == found.cpr.value
    one = curve(clean=torch.ones(1), empty=torch.zeros(1), values=torch.ones(10, 1))
    assert one.cmd.value == 0 and one.cpr.value == pytest.approx(0.999)
    assert np.isnan(one.cpr.low)


def _more():
    generator = np.random.default_rng(0)
    generator.integers(0, 6, (64, 6))
    left = 1000 - 64
    while left > 0:
        yield generator.integers(0, 6, (min(64, left), 6))
        left -= 64


def test_smallest_stays():
    values = torch.tensor([0.1, 0.9, 0.5, 0.95, 1.0]).double()[:, None].expand(5, 3)
    found = curve(
        fractions=(0.1, 0.2, 0.3, 0.5, 1.0), sizes=(1, 2, 3, 5, 10), clean=torch.ones(3).double(),
        empty=torch.zeros(3).double(), values=values,
    )  # fmt: skip
    assert [found.smallest(tau) for tau in (0.05, 0.4, 0.9, 1.0, 1.1)] == [1, 2, 5, 10, None]


@pytest.mark.parametrize("level", ["edge", "node"])
def test_a_curve_of_several_circuits(level):
    model = made("llama")
    circuits = [
        find_circuit(model, *GIVEN, "gim", level=level, replicates=0),
        random_circuit(find_circuit(model, *GIVEN, "eap", replicates=0).graph, level, seed=1),
    ]
    got = faithfulness_curve(model, *GIVEN, circuits, absolute=True)
    patcher = Patcher("test", model, *GIVEN, level)
    for one, found in zip(circuits, got, strict=True):
        assert [found.method, found.level] == [one.method, level]
        n = one.graph.n_edges if level == "edge" else 16
        assert found.sizes == tuple(int(x * n) for x in MIB)
        masks = [one.select(size, absolute=True).mask for size in found.sizes]
        expected = patcher.measure(masks)
        torch.testing.assert_close(found.values, expected.values, rtol=0, atol=1e-11)
        with torch.no_grad():
            for ids, values in ((CLEAN, found.clean), (OTHER, found.empty)):
                logits = model(ids).logits[:, -1]
                torch.testing.assert_close(values, logits[:, 7] - logits[:, 9])
        assert torch.equal(found.values[-1], found.clean)
    assert not torch.equal(circuits[0].select(0.5).mask, circuits[1].select(0.5).mask)
    alone = faithfulness_curve(model, *GIVEN, circuits[0], absolute=True)
    assert torch.allclose(alone.values, got[0].values, atol=1e-11)


def test_what_is_refused():
    model = made("llama")
    found = find_circuit(model, *GIVEN, "eap", replicates=0)
    nodes = random_circuit(found.graph, "node")
    other = random_circuit(find_circuit(made("gpt2"), *GIVEN, "eap", replicates=0).graph)

    class Never(torch.nn.Module):
        def forward(self, *args, **kwargs):
            raise AssertionError("the model runs")

    for circuits, options, error, message in (
        ([], {}, TypeError, "circuits must be Circuits, got none"),
        ([found.scores], {}, TypeError, "circuits must be Circuits, got Tensor"),
        ([found, nodes], {}, ValueError, "of one level, got edge and node"),
        ([found, other], {}, ValueError, "of one model, got Llama.* and GPT2"),
        (found, {"fractions": (0.5, 0.1)}, ValueError, "fractions must be ascending"),
    ):
        with pytest.raises(error, match=message):
            faithfulness_curve(Never(), *GIVEN, circuits, **options)
    with pytest.raises(ValueError, match="of this model, Llama.*, got one of GPT2"):
        faithfulness_curve(model, *GIVEN, other)
    with pytest.raises(ValueError, match="tau must be above 0 and at most 1"):
        minimal_circuit(Never(), *GIVEN, found, 1.5)
    with pytest.raises(ValueError, match="level must be one of"):
        random_circuit(found.graph, "neuron")
    with pytest.raises(TypeError, match="models must be a dict"):
        rank_models([model], tasks_of())
    with pytest.raises(TypeError, match="task must be a Task"):
        rank_models({"a": Never()}, lambda tokenizer: None)


def searching(n, tau, f):
    def look(sizes):
        assert not set(sizes) & search.seen.keys()
        search.seen |= {size: float(f(size)) for size in sizes}

    search = _Search(n, tau, look)
    return search


def test_the_search_ends_at_a_crossing():
    for seed in range(20):
        generator = np.random.default_rng(seed)
        n = int(generator.integers(1, 3000))
        f = np.linspace(0, 1, n + 1) ** 0.3 + 0.1 * generator.standard_normal(n + 1)
        f[[0, n]] = 0, 1

        search = searching(n, 0.7, f.__getitem__)
        size = search.run([int(x * n) for x in MIB])
        assert f[size] >= 0.7 > f[size - 1]
        assert all(one >= 0.7 for at, one in search.seen.items() if at >= size)
        assert len(search.seen) < 80
    search = searching(3000, 0.7, lambda size: size / 3000)
    assert search.run([]) == 2100 and len(search.seen) < 30


def test_the_smallest_circuit_by_trying_all():
    model = made("llama")
    circuit = find_circuit(model, *GIVEN, "eap", replicates=0, level="node")
    found = minimal_circuit(model, *GIVEN, circuit, 0.6)
    masks = [circuit.select(size).mask for size in range(17)]
    measured = Patcher("test", model, *GIVEN, "node").measure(masks)
    f = (measured.values.mean(1) - measured.empty.mean()) / (
        measured.clean.mean() - measured.empty.mean()
    )
    assert f[found.size] >= 0.6 > f[found.size - 1]
    for size, value in found.curve:
        assert value == pytest.approx(float(f[size]), abs=1e-10)
        assert value >= 0.6 or size < found.size
    assert found.faithfulness.value == pytest.approx(float(f[found.size]), abs=1e-10)
    assert len(found.selection) == found.size and found.of == 16
    assert torch.equal(found.selection.mask, masks[found.size])
    assert set(found.earlier) == {s for s, v in found.curve if v >= 0.6 and s < found.size}
    assert f"{found.size} of 16 nodes" in str(found)


def tasks_of():
    ids = (CLEAN, OTHER, torch.ones_like(CLEAN))
    texts = tuple(str(row) for row in CLEAN.tolist())
    return Task("numbers", texts, texts, *ids, ((7,),) * 4, ((9,),) * 4)


def test_models_in_the_order_of_their_circuits():
    models = {name: made(name) for name in ("llama", "gpt2")}
    task = tasks_of()
    found = rank_models(models, task, 0.5, method="eap", level="node")
    for name, row in found.rows:
        circuit = find_circuit(models[name], *GIVEN, "eap", replicates=0, level="node")
        alone = minimal_circuit(models[name], *GIVEN, circuit, 0.5)
        assert (row.size, row.of) == (alone.size, alone.of)
    assert [name for name, _ in found.rows] == sorted(
        models, key=lambda n: dict(found.rows)[n].fraction
    )
    assert "numbers" in str(found) and "llama" in str(found)
    given = {name: (model, name) for name, model in models.items()}
    asked = []
    again = rank_models(given, lambda t: asked.append(t) or task, 0.5, method="eap", level="node")
    assert str(again) == str(found) and asked == list(models)
