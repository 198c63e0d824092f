# SPDX-License-Identifier: Apache-2.0
"""What is said of every feature is what all its activations say, for every kind of codes."""

import math
from collections import Counter

import pytest
import torch
from full_disk import largest_file
from variants import LAYERS, VARIANTS, D, F

from mikernels.circuits import logit_lens
from mikernels.evaluate import firing as firing_room
from mikernels.evaluate.excerpts import AFTER, BEFORE, PHRASE
from mikernels.report import collect as collect_room
from mikernels.report import collect_features
from mikernels.values.codes import SparseCodes

WINDOW, N, WORDS = 37, 1200, 40


def made(kind, seed=0):
    """An SAE whose features fire at all strengths, rows of text that repeats itself, pieces."""
    torch.manual_seed(seed)
    variant, settings = VARIANTS[kind]
    sae = variant(D, F, **settings).eval()
    with torch.no_grad():
        for parameter in (sae.w_dec, sae.b_enc):
            parameter.copy_(torch.randn(parameter.shape) * 0.3)
    words = torch.randint(0, WORDS, (N,))
    # a copied stretch, across the windows of the original
    words[900:1100] = words[300:500]
    x = torch.randn(WORDS, D)[words] + 0.2 * torch.randn(N, D)
    x[900:1100] = x[300:500]
    rows = {
        "activations": x,
        "token_ids": words * 3,
        "windows": torch.arange(N) // WINDOW,
        "positions": torch.arange(N) % WINDOW + 1,
    }
    # two tokens of one text
    pieces = {str(3 * i): f" w{max(i, 1)}" for i in range(WORDS)}
    return sae, rows, pieces


def cut(rows, size):
    for start in range(0, len(rows["activations"]), size):
        yield {name: column[start : start + size] for name, column in rows.items()}


def oracle(acts, rows, pieces, n_examples, n_samples):
    """Of one feature, from all its activations, token by token."""
    windows, ids = rows["windows"].tolist(), rows["token_ids"].tolist()

    def around(r):
        near = range(max(0, r - BEFORE), min(N, r + AFTER + 1))
        return [q for q in near if windows[q] == windows[r]]

    def phrase(r):
        near = range(max(0, r - PHRASE), r + 1)
        return tuple(ids[q] for q in near if windows[q] == windows[r])

    active = [r for r in range(N) if acts[r] > 0]
    peaks = [r for r in active if acts[r] == max(acts[q] for q in around(r))]
    peaks.sort(key=lambda r: (-acts[r], r))
    covered, seen = set(), set()

    def take(some, n):
        found = []
        for r in some:
            if len(found) < n and not covered & set(around(r)):
                covered.update(around(r))
                if phrase(r) not in seen:
                    seen.add(phrase(r))
                    found.append(r)
        return found

    maximum = max(acts)
    best = take(peaks, n_examples)
    sampled = []
    for quarter in (3, 2, 1):
        low, high = (maximum * q / 4 for q in (quarter - 1, quarter))
        band = [r for r in peaks if low < acts[r] <= high]
        for i in range(n_samples):
            part = band[len(band) * i // n_samples : len(band) * (i + 1) // n_samples]
            sampled += take(part, 1)
    mass = Counter()
    for r in active:
        mass[pieces[str(ids[r])]] += acts[r]
    histogram = [0] * 20
    for r in active:
        histogram[min(int(acts[r] * 20 / maximum), 19)] += 1
    return best, sampled, mass, histogram, len(active), maximum, around


@pytest.mark.parametrize("kind", ["topk", "jumprelu", "crosscoder", "cross_layer_transcoder"])
def test_views_are_what_the_dense_activations_say(kind, tmp_path, monkeypatch):
    sae, rows, pieces = made(kind)
    with torch.no_grad():
        dense = sae.encode(rows["activations"]).to_dense()
    total = dense.shape[1]
    assert total == (LAYERS * F if kind == "cross_layer_transcoder" else F)
    wanted = dict(examples=4, samples=2, batch=128)
    features = collect_features(sae, [rows], pieces, **wanted)
    assert torch.equal(features.counts, (dense > 0).sum(0))
    assert torch.equal(features.maxima, dense.amax(0).clamp(min=0))
    views = list(features.views(0, total))
    assert [view.number for view in views] == list(range(total))
    n_sampled = 0
    for view in views[:F:3]:
        acts = dense[:, view.number].tolist()
        if not view.count:
            assert max(acts) <= 0 and not view.examples + view.samples + view.tokens
            assert view.label == "" and view.maximum == view.mean == sum(view.histogram) == 0
            continue
        best, sampled, mass, histogram, count, maximum, around = oracle(acts, rows, pieces, 4, 2)
        assert [e.row for e in view.examples] == best
        assert [e.row for e in view.samples] == sampled
        n_sampled += len(sampled)
        assert (view.count, view.maximum, view.histogram) == (count, maximum, histogram)
        assert view.mean == pytest.approx(math.fsum(a for a in acts if a > 0) / count, rel=1e-12)
        assert view.density == count / N
        for example in view.examples + view.samples:
            inside = around(example.row)
            assert example.scores == [max(acts[r], 0) for r in inside]
            assert example.tokens == [pieces[str(int(rows["token_ids"][r]))] for r in inside]
            assert inside[example.peak] == example.row and example.value == acts[example.row]
            assert example.window == example.row // WINDOW and example.document is None
            assert example.position == example.row % WINDOW + 1
        shares = [(text, pytest.approx(part / sum(mass.values()))) for text, part in mass.items()]
        for text, share in view.tokens:
            assert (text, share) in shares
        top = sorted(mass.values(), reverse=True)[:6]
        assert [s for _, s in view.tokens] == pytest.approx([m / sum(mass.values()) for m in top])
        assert view.label == " \u00b7 ".join(text.strip() for text, _ in view.tokens[:3])
    assert n_sampled > F / 3 and any(len(view.examples) == 4 for view in views)
    # in other parts, in runs that are sorted one by one on the disk, and few features at a time
    monkeypatch.setattr(firing_room, "RUN", 700)
    monkeypatch.setattr(firing_room, "FEATURES", 13)
    monkeypatch.setattr(collect_room, "BLOCK", 300)
    again = collect_features(sae, cut(rows, 501), pieces, scratch=tmp_path, **wanted)
    assert len(again.firing._runs) > 3 and not any(tmp_path.iterdir())
    assert list(again.views(0, total + 5)) == views
    assert [again.view(f) for f in (0, 7, total - 1)] == [views[f] for f in (0, 7, total - 1)]


@pytest.mark.parametrize("kind", ["topk", "crosscoder", "cross_layer_transcoder"])
def test_similar_features_are_those_of_the_whole_matrix(kind):
    sae, rows, pieces = made(kind)
    layers = LAYERS if kind == "cross_layer_transcoder" else 1
    matrices = [sae.decoder(i) for i in range(layers)] if layers > 1 else [sae.w_dec]
    with torch.no_grad():
        # copies of one feature, at other lengths, and one that writes nothing
        for copy in (3, 20, 40):
            matrices[0][copy] = matrices[0][7] * copy
        matrices[0][30] = 0
    n = 5
    views = list(collect_features(sae, [rows], pieces, similar=n).views(0, layers * F))
    for layer, matrix in enumerate(matrices):
        w = matrix.detach().double()
        norms = w.norm(dim=1)
        cosines = w @ w.T / (norms[:, None] * norms)
        cosines.fill_diagonal_(-2)
        for f in range(F):
            found = views[layer * F + f].similar
            numbers = [number - layer * F for number, _ in found]
            if norms[f] == 0:
                assert found == []
                continue
            assert len(set(numbers)) == n and min(numbers) >= 0 and max(numbers) < F
            assert f not in numbers and not (layer == 0 and 30 in numbers)
            values = [value for _, value in found]
            torch.testing.assert_close(
                torch.tensor(values, dtype=torch.float64),
                cosines[f].nan_to_num(-2).topk(n).values,
                atol=1e-6,
                rtol=0,
            )
            for number, value in zip(numbers, values, strict=True):
                assert cosines[f, number] == pytest.approx(value, abs=1e-6)
    assert {number for number, _ in views[7].similar[:3]} == {3, 20, 40}


@pytest.mark.parametrize("kind", ["topk", "crosscoder", "cross_layer_transcoder"])
def test_tokens_are_those_of_what_features_write_to_the_model(kind):
    from decoder_cases import tiny

    model = tiny("llama", torch.float32)
    d = model.config.hidden_size
    variant, settings = VARIANTS[kind]
    per = 1 if kind == "topk" else LAYERS
    if kind == "cross_layer_transcoder":
        settings = settings | {"d_out": d * per}
    torch.manual_seed(0)
    sae = variant(d * per, 30, **settings).eval()
    with torch.no_grad():
        sae.w_dec.copy_(torch.randn(sae.w_dec.shape))
        for name in ("layer_scale", "target_scale"):
            if hasattr(sae, name):
                getattr(sae, name).copy_(torch.tensor([1.0, 2.0, 4.0, 0.5]))
    n = 60
    rows = {
        "activations": torch.randn(n, d * per),
        "token_ids": torch.arange(n) % 50,
        "windows": torch.arange(n) // 20,
    }
    pieces = {str(i): f"w{i}" for i in range(model.config.vocab_size)}
    features = collect_features(sae, [rows], pieces, model=model, promoted=4)
    with torch.no_grad():
        if kind == "topk":
            written = sae.w_dec
        else:
            # what one code adds to the output, layer by layer, beside those of others that are 0
            count = features.n_features
            first = torch.arange(0, count, 30).expand(count, -1)
            own = torch.arange(count)[:, None]
            is_own = own // 30 == first // 30
            codes = SparseCodes(is_own.float(), torch.where(is_own, own, first), count)
            nothing = sae.decode(codes.with_values(torch.zeros(codes.values.shape)))
            layers = (sae.decode(codes) - nothing).reshape(count, per, d)
            written = layers[:, -1] if kind == "crosscoder" else layers.sum(1)
    expected = logit_lens(model, written, k=4)
    for view in features.views(0, features.n_features):
        for got, suppressed in ((view.promoted, False), (view.suppressed, True)):
            own = expected.tokens(view.number, suppressed)
            assert [text for text, _ in got] == [f"w{token}" for token, _ in own]
            assert [s for _, s in got] == pytest.approx([s for _, s in own], rel=1e-4, abs=1e-5)
    with pytest.raises(ValueError, match=rf"features of sae write to, {D}, got one of {d}"):
        collect_features(made("topk")[0], [rows], pieces, model=model)


def test_a_tokenizers_texts_are_those_within_a_text():
    class Sentences:
        words = (" the", "!", "\ufffd")

        def decode(self, ids):
            return "".join(self.words[i] for i in ids).removeprefix(" ")

    sae, rows, _ = made("topk")
    rows["token_ids"] = rows["token_ids"] // 3 % 3
    texts = {
        text
        for view in collect_features(sae, [rows], Sentences()).views(0, F)
        for example in view.examples
        for text in example.tokens
    }
    assert texts == {" the", "!", "\ufffd"}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"rows": []}, "x must hold at least one row, got none"),
        ({"without": "windows"}, "rows must have .* got no windows"),
        ({"x": torch.randn(N, D + 1)}, f"sae must be of width {D + 1} like the activations"),
        ({"x": torch.full((N, D), math.nan)}, "NaN or inf in .* of the .* rows from row 0 on"),
        ({"x": torch.randn(N)}, r"activations must be \[rows, d\], got"),
        ({"x": torch.randn(N - 1, D)}, rf"token_ids must be whole numbers \[{N - 1}\] like"),
        ({"windows": torch.rand(N)}, rf"windows must be whole numbers \[{N}\] .* torch.float32"),
        ({"rows": {"activations": torch.randn(N, D)}}, r"must be an iterable .* pass \[rows\]"),
        ({"windows": torch.arange(N) % 2}, "rows must be in reading order, .* got window 0"),
        ({"scratch": "/nowhere"}, "scratch must be an existing folder, got /nowhere"),
        ({"samples": -1}, "samples must be at least 0, got -1"),
        ({"examples": True}, "examples must be at least 1, got True"),
        ({"text": 3}, "text must be a tokenizer or a dict .* got int"),
    ],
)
def test_bad_input_is_refused(change, message):
    sae, rows, pieces = made("topk")
    text = change.pop("text", pieces)
    rows["activations"] = change.pop("x", rows["activations"])
    rows["windows"] = change.pop("windows", rows["windows"])
    rows.pop(change.pop("without", None), None)
    given = change.pop("rows", [rows])
    with pytest.raises((ValueError, TypeError), match=message):
        collect_features(sae, given, text, **change)


def test_a_view_that_there_is_not():
    sae, rows, pieces = made("topk")
    features = collect_features(sae, [rows], pieces)
    for number in (-1, F):
        with pytest.raises(IndexError, match=f"view: feature must be in 0..{F - 1}, got {number}"):
            features.view(number)
    assert list(features.views(F, F)) == []


def test_scratch_is_left_empty_whatever_happens(tmp_path, monkeypatch):
    sae, rows, pieces = made("topk")
    monkeypatch.setattr(firing_room, "RUN", 700)

    def interrupted():
        yield from cut(rows, 400)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect_features(sae, interrupted(), pieces, scratch=tmp_path, batch=100)
    message = f"collect_features: activations must be written to {tmp_path}, got File too large"
    with largest_file(3000), pytest.raises(OSError, match=message):
        collect_features(sae, [rows], pieces, scratch=tmp_path)
    assert not any(tmp_path.iterdir())
