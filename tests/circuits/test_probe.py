# SPDX-License-Identifier: Apache-2.0
"""gim_probe and attribute on tiny decoders, against gradients taken by hand under their rules."""

import math

import numpy as np
import pytest
import torch
from decoder_cases import IDS, hooks_of, letters, padded, parts, tiny
from demo_cases import check_self_contained
from lens_cases import lens
from oracle import randn

from mikernels.circuits import (
    attribute,
    compute_gradient_interactions,
    gim_probe,
    gradient_components,
    rules,
)
from mikernels.values.intervals import Interval, bootstrap, mean_intervals, resampled_means

KINDS = ("llama", "gpt2", "gemma2")
OTHER = torch.tensor([[3, 14, 21, 9, 2], [6, 5, 35, 30, 9]])
PAIR = (7, 11)


def by_hand(model, ids, preset):
    """The embeddings, and of each layer z and what its MLP returns; and gradients at each of them
    of a logit difference."""
    found, handles = [], []

    def embed(module, args, output):
        found.append(output.detach().requires_grad_())
        return found[0]

    handles.append(model.get_input_embeddings().register_forward_hook(embed))
    for layer in range(3):
        _, projection, mlp = parts(model, layer)
        handles.append(projection.register_forward_pre_hook(lambda m, args: found.append(args[0])))
        handles.append(mlp.register_forward_hook(lambda m, args, out: found.append(out)))
    for p in model.parameters():
        p.requires_grad_(False)
    with rules(model, preset):
        logits = model(ids).logits[:, -1]
        grads = torch.autograd.grad((logits[:, PAIR[0]] - logits[:, PAIR[1]]).sum(), found)
    for handle in handles:
        handle.remove()
    return [x.detach() for x in found], grads


@pytest.mark.parametrize("preset", ["gim", "plain"])
@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_activation_times_gradient_under_the_rules(kind, preset):
    model = tiny(kind)
    before = hooks_of(model)
    x, grads = by_hand(model, IDS, preset)
    other, _ = by_hand(model, OTHER, preset)
    for counterfactual in (None, OTHER):
        probe = gim_probe(
            model, IDS, PAIR, k=4, rules=preset, counterfactual=counterfactual, batch_size=1
        )
        assert probe.scores.shape == (2, 5, 15) and len(probe.names) == 15
        expected = []
        for layer in range(3):
            for place, shape in ((1 + 2 * layer, (4, 6)), (2 + 2 * layer, (1, 24))):
                a = x[place] if counterfactual is None else x[place] - other[place]
                if place % 2 == 0 and kind == "gemma2":
                    # a norm reads the MLP: what that makes is what is written
                    expected.append(None)
                    continue
                expected += (a * grads[place]).unflatten(-1, shape).sum(-1).unbind(-1)
        for i, score in enumerate(expected):
            if score is not None:
                got = probe.scores[..., i].double()
                torch.testing.assert_close(got, score.double(), rtol=1e-4, atol=1e-5)
    assert hooks_of(model) == before and all(p.grad is None for p in model.parameters())


def test_ranking_intervals_and_interactions():
    model = tiny("llama")
    ids = torch.cat([IDS, IDS.flip(1), IDS.roll(1, 1)])
    probe = gim_probe(model, ids, PAIR, k=4, batch_size=4)
    units = probe.scores.sum(1).double()
    means = units.mean(0)
    assert [c.name for c in probe.ranking] == [probe.names[i] for i in (-means.abs()).argsort()]
    assert len(probe.components) == 4 and sum(c.stability for c in probe.ranking) >= 4
    for c in probe.ranking:
        i = probe.names.index(c.name)
        own = units[:, i]
        reach = 2.5706 * own.std() / math.sqrt(6)
        assert c.score.value == pytest.approx(own.mean().item(), abs=1e-12)
        assert c.score.high - c.score.value == pytest.approx(reach.item(), rel=2e-3)
        assert c.name == (f"L{c.layer}.mlp" if c.head is None else f"L{c.layer}.h{c.head}")
    with rules(model, "gim"):
        grads = gradient_components(model, ids, PAIR, heads=True, attribution=True)
    pairs = compute_gradient_interactions(grads, normalize=True)
    assert probe.pairs.names == pairs.names == probe.names
    torch.testing.assert_close(probe.pairs.scores, pairs.scores)
    chosen = {c.name for c in probe.components}
    assert len(probe.interactions) == 4
    for edge in probe.interactions:
        assert {edge.first, edge.second} <= chosen
        i, j = (probe.names.index(name) for name in (edge.first, edge.second))
        assert edge.score == pytest.approx(pairs.scores[i, j].item(), abs=1e-6)
    heads = probe.head_matrix()
    assert heads.shape == (3, 4) and heads[1, 2] == pytest.approx(means[5 + 2].item(), abs=1e-6)
    whole = gim_probe(model, ids, PAIR, heads=False)
    assert whole.names[:2] == ("L0.attn", "L0.mlp")
    torch.testing.assert_close(whole.scores[..., 0], probe.scores[..., :4].sum(-1))
    with pytest.raises(ValueError, match="heads=True"):
        whole.head_matrix()


def test_bias_and_heads_are_the_projections_output():
    """Where the gradient is another on its way through the projection, they are not."""
    model = tiny("gpt2")
    gim_probe(model, IDS, PAIR)
    gim_probe(model, IDS, PAIR, counterfactual=OTHER)
    projection = parts(model, 1)[1]

    class Odd(type(projection)):
        def forward(self, x):
            return super().forward(x + 1e-4 * (x - x.detach()))

    projection.__class__ = Odd
    for counterfactual in (None, OTHER):
        with pytest.raises(ValueError, match="heads and bias of block 1 must add up to what the p"):
            gim_probe(model, IDS, PAIR, rules="plain", counterfactual=counterfactual)


@pytest.mark.parametrize("layout", ["left", "mixed"])
def test_padding_and_batches_change_nothing(layout):
    model, batch = tiny("llama"), padded(layout)
    found = gim_probe(model, batch, PAIR)
    tokens = attribute(model, batch, PAIR)
    for row, kept in enumerate(batch["attention_mask"] == 1):
        ids = batch["input_ids"][row, kept]
        alone = gim_probe(model, ids, PAIR)
        assert alone.kept.shape == (1, len(ids)) and not found.scores[row, ~kept].any()
        torch.testing.assert_close(found.scores[row, kept], alone.scores[0], rtol=1e-5, atol=1e-6)
        assert found.values[row].item() == pytest.approx(alone.values[0].item(), rel=1e-9)
        assert len(found.tokens[row]) == len(found.positions[row]) == len(ids)
        assert np.isnan([alone.ranking[0].stability, alone.ranking[0].score.low]).all()
        own = attribute(model, ids, PAIR).scores[0]
        torch.testing.assert_close(tokens.scores[row, kept], own, rtol=1e-5, atol=1e-6)
        assert not tokens.scores[row, ~kept].any()


def test_texts_are_padded_and_named():
    model, tokenizer = tiny("llama"), letters()
    texts = ["c n o i b", "f e h"]
    probe = gim_probe(model, texts, [("g", "k"), ("k", "g")], tokenizer=tokenizer, k=3)
    assert probe.tokens == [list("cnoib"), list("feh")]
    assert probe.kept.tolist() == [[True] * 5, [False] * 2 + [True] * 3]
    one = gim_probe(model, [3, 14, 15, 9, 2], PAIR, k=3)
    torch.testing.assert_close(probe.scores[:1], one.scores, rtol=1e-5, atol=1e-6)
    assert probe.label == "logit difference of a pair per prompt" and "2 prompts" in str(probe)
    same = gim_probe(model, texts[0], ("g", "k"), tokenizer=tokenizer, k=3)
    lines = str(same).splitlines()
    assert lines[0].startswith("logit difference 'g' - 'k': ") and len(lines) > 8
    assert lines[2].split()[1] == same.ranking[0].name and lines[1].endswith("most at")
    assert same.where(same.ranking[0]) in "cnoib"
    from rich.console import Console

    console = Console(width=100)
    with console.capture() as shown:
        console.print(same)
    assert same.ranking[0].name in shown.get() and str(one.tokens[0][0]) == "3"


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma"])
def test_tokens_are_embedding_less_baseline_times_gradient(kind):
    model = tiny(kind, **({"head_dim": 6, "num_key_value_heads": 2} if kind == "gemma" else {}))
    x, grads = by_hand(model, IDS, "gim")
    own = randn(24, dtype=torch.float64)
    table = model.get_input_embeddings()
    with torch.no_grad():
        a = table(torch.tensor(1))
    for baseline, options, less in (
        (None, {}, 0),
        ("zero", {"tokenizer": letters()}, 0),
        (1, {}, a),
        ("a", {"tokenizer": letters()}, a),
        (own, {}, own),
        (x[0], {}, x[0]),
    ):
        found = attribute(model, IDS, PAIR, baseline=baseline, **options)
        expected = ((x[0] - less) * grads[0]).sum(-1)
        torch.testing.assert_close(found.scores.double(), expected, rtol=1e-4, atol=1e-6)
    assert not found.scores.any() and hooks_of(model) == 0
    # by itself the space, which these letters do not have
    with pytest.raises(ValueError, match=r"baseline ' ' must be one token.*or baseline='zero'"):
        attribute(model, IDS, PAIR, tokenizer=letters())
    for baseline, message in (
        (50, "in 0..49, got 50"), (own[:3], r"\[24\] or \[2, 5, 24\], got \[3\]"), ({}, "got {}")
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"attribute: baseline must be .*{message}"):
            attribute(model, IDS, PAIR, baseline=baseline)


def test_pages_are_self_contained_and_escape_tokens(tmp_path):
    model = tiny("llama")

    class Odd:
        pad_token_id = None

        def decode(self, ids):
            return "<b>&" if ids[0] == 14 else f" {ids[0]}"

    probe = gim_probe(model, IDS, PAIR, k=3, tokenizer=Odd())
    one = gim_probe(model, IDS[0], PAIR, k=3, tokenizer=Odd())
    found = attribute(model, IDS, PAIR, tokenizer=Odd(), baseline="zero")
    for name, value in (("probe", probe), ("one", one), ("tokens", found)):
        written = value.to_html(tmp_path / f"{name}.html")
        assert written == (tmp_path / f"{name}.html").read_text(encoding="utf-8")
        check_self_contained(written)
        assert "&lt;b&gt;&amp;" in written and "<b>&" not in written
        assert "frozen" in written
    assert written.count("<span ") == 10
    page = probe.to_html()
    assert page.count("<title>L") == 12 and "95 % interval" in page
    assert "95 % interval" not in one.to_html() and "/-" not in page.replace("</", "")
    # pairs have no direction
    assert '<th colspan="2">pair</th>' in page and "A pair has no direction" in page
    assert all(word not in page for word in ("<th>source", "<th>target", "→", "-&gt;"))


def test_inputs_are_refused_before_the_model_runs():
    model, tokenizer = tiny("llama"), letters()
    tokenizer.pad_token = "z"
    runs = []
    handle = model.register_forward_pre_hook(lambda *_: runs.append(1))
    pads = torch.tensor([[3, 14, 15, 9], [6, 5, 26, 26]])
    for given, target, options, message in (
        ("a b", 7, {}, "input_tokens must be token ids without a tokenizer, got text"),
        (3.5, 7, {}, "input_tokens must be token ids .* got float"),
        ([], 7, {}, "got none"),
        ([["a"]], 7, {}, "got lists of something else"),
        (IDS.float(), 7, {}, "got input_ids of torch.float32"),
        (IDS + 40, 7, {}, r"input_tokens must be in 0..49 \(embeddings\), got 75"),
        (pads, 7, {"tokenizer": tokenizer}, r"padding tokens \(26\) in row 1 without one"),
        (IDS, 50, {}, r"target must be in 0..49 \(vocabulary\), got 50"),
        (IDS, (7, 7), {}, "a pair of different tokens, got 7"),
        (IDS, "g h", {"tokenizer": tokenizer}, "target 'g h' must be one token, got 2: 'g'.*'h'"),
        (IDS, 7, {"k": 0}, "k must be"),
        (IDS, 7, {"batch_size": 0}, "batch_size must be at least 1"),
        (IDS, 7, {"counterfactual": OTHER[:, 1:]}, r"got 4 tokens for 5 in row 0 .*as many tokens"),
        (IDS, 7, {"counterfactual": OTHER[:1]}, r"got 0 tokens for 5 in row 1"),
        (IDS, 7, {"counterfactual": IDS}, "differ from input_tokens, got the same .* row 0"),
        (IDS, 7, {"rules": "gym"}, "preset"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            gim_probe(model, given, target, **options)
    assert not runs
    with pytest.raises(ValueError, match=r"gim_probe: target <lambda> must return a scalar for"):
        gim_probe(model, IDS, lambda logits: logits.mean())
    handle.remove()


def test_without_rules_the_gradients_are_the_models_own():
    model = tiny("llama")
    for function in (gim_probe, attribute):
        found, plain = (function(model, IDS, PAIR, rules=which) for which in (None, "plain"))
        assert torch.equal(found.scores, plain.scores)
        assert found.rules is None and "Backward rules" not in found.to_html()
        assert not torch.equal(found.scores, function(model, IDS, PAIR).scores)


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore:HookedTransformer is deprecated")
@pytest.mark.parametrize("kind", ["gpt2", "llama", "pythia, split", "gemma2", "attn only"])
def test_hooked_transformers(kind):
    model = lens(kind)
    for counterfactual in (None, OTHER):
        found = gim_probe(model, IDS, PAIR, counterfactual=counterfactual)
        assert found.scores.shape == (2, 5, 8 if kind == "attn only" else 10)
    if kind != "gemma2":
        found = gim_probe(model, IDS, PAIR)
        with rules(model, "gim"):
            grads = gradient_components(model, IDS, PAIR, heads=True, attribution=True)
        for i, name in enumerate(found.names):
            expected = grads[name].sum(-1).float()
            torch.testing.assert_close(found.scores[..., i], expected, rtol=1e-4, atol=1e-5)
    assert attribute(model, IDS, PAIR).scores.shape == (2, 5)


def test_a_callable_gets_all_prompts_at_once():
    model, answers = tiny("llama"), torch.tensor([7, 11])

    def metric(logits):
        assert logits.shape == (2, 5, 50)
        return logits[torch.arange(2), -1, answers]

    found = gim_probe(model, IDS, metric, batch_size=1)
    assert found.label == "metric"
    torch.testing.assert_close(found.scores, gim_probe(model, IDS, answers).scores)


def test_intervals_of_means():
    units = np.random.default_rng(0).normal(size=(9, 3))
    found = resampled_means(units, 200, seed=3)
    assert found.shape == (200, 3)
    low, high = np.quantile(found[:, 1], [0.025, 0.975])
    # the same draws as bootstrap's
    same = bootstrap(lambda s: s[..., 1].mean(-1), units, 200, seed=3)
    assert (low, high) == pytest.approx((same.low, same.high))
    for n, t in ((2, 12.7062), (3, 4.3027), (4, 3.1824), (7, 2.4469), (31, 2.0423)):
        units = np.arange(n, dtype=float)[:, None]
        (interval,) = mean_intervals(units)
        reach = t * units.std(ddof=1) / math.sqrt(n)
        assert interval.high - interval.value == pytest.approx(reach, rel=2e-3)
        assert interval.value - interval.low == pytest.approx(reach, rel=2e-3)
    (one,) = mean_intervals(np.ones((1, 1)))
    assert one.value == 1 and math.isnan(one.low)
    assert isinstance(one, Interval)
