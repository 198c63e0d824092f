# SPDX-License-Identifier: Apache-2.0
"""What is said of every feature is what all its activations say, for every kind of codes."""

import math
from collections import Counter

import pytest
import torch
from variants import LAYERS, VARIANTS, D, F

from mikernels.evaluate import firing as firing_room
from mikernels.evaluate.excerpts import AFTER, BEFORE, PHRASE
from mikernels.report import collect_features

WINDOW, N, WORDS = 37, 1500, 40


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
    for view in views[:F]:
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
    assert n_sampled > F and any(len(view.examples) == 4 for view in views)
    # in other parts, in runs that are sorted one by one on the disk, and few features at a time
    monkeypatch.setattr(firing_room, "RUN", 700)
    monkeypatch.setattr(firing_room.Firing.chunks, "__defaults__", (900,))
    again = collect_features(sae, cut(rows, 501), pieces, scratch=tmp_path, **wanted)
    assert len(again.firing._runs) > 3 and not any(tmp_path.iterdir())
    assert list(again.views(0, total + 5)) == views
    assert [again.view(f) for f in (0, 7, total - 1)] == [views[f] for f in (0, 7, total - 1)]
