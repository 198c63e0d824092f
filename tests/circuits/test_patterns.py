# SPDX-License-Identifier: Apache-2.0
"""What heads attend to, from the patterns that eager attention returns, written out per query."""

import pytest
import torch
from decoder_cases import hooks_of, parts, tiny
from demo_cases import check_self_contained

from mikernels.circuits import attention_patterns, head_scores

PADDED = torch.tensor([[3, 3, 3, 5, 5, 3, 3], [7, 8, 7, 7, 9, 7, 8]])
MASK = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])
IDS = torch.tensor([[3, 14, 15, 3, 14, 15, 9, 9], [7, 7, 8, 21, 7, 8, 7, 3]])


def weights(model, ids, mask):
    """Of each layer [B, H, P, P]."""
    model.set_attn_implementation("eager")
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        return model(
            ids, attention_mask=mask, position_ids=positions, output_attentions=True
        ).attentions


def by_hand(model, ids, mask=None):
    """[3, L, H] from output_attentions."""
    mask = torch.ones_like(ids) if mask is None else mask
    attentions = weights(model, ids, mask)
    kinds = []
    for key in (
        lambda b, t, s: 0 < s <= t and mask[b, s - 1] and ids[b, s - 1] == ids[b, t],
        lambda b, t, s: s == t - 1,
        lambda b, t, s: s < t and ids[b, s] == ids[b, t],
    ):
        total, queries = 0, 0
        for b in range(len(ids)):
            for t in range(ids.shape[1]):
                there = [s for s in range(t + 1) if mask[b, s] and key(b, t, s)]
                if mask[b, t] and there:
                    queries += 1
                    total = total + torch.stack([a[b, :, t, there].sum(-1) for a in attentions])
        kinds.append(total / queries)
    return torch.stack(kinds)


@pytest.mark.parametrize(
    "kind, implementation",
    [
        ("llama", "sdpa"),
        ("llama", "eager"),
        ("gpt2", "sdpa"),
        ("gpt_neox", "eager"),
        ("gemma2", "eager"),
    ],
)
def test_scores_are_those_of_the_models_patterns(kind, implementation, monkeypatch):
    model = tiny(kind)
    model.set_attn_implementation(implementation)
    forwards = [vars(parts(model, layer)[0]).get("forward") for layer in range(3)]
    monkeypatch.setattr("mikernels.circuits.patterns.CHUNK", 100)
    # eager attention of an fp64 model is NaN at padding
    model = model.float()
    found = head_scores(model, IDS, batch_size=1)
    padded = {"input_ids": PADDED, "attention_mask": MASK}
    beside = head_scores(model, padded)
    shown = attention_patterns(model, padded, ["L2.h3", "L0.h1"])
    assert [vars(parts(model, layer)[0]).get("forward") for layer in range(3)] == forwards
    assert hooks_of(model) == 0 and model.config._attn_implementation == implementation
    for scores, (ids, mask) in ((found, (IDS, None)), (beside, (PADDED, MASK))):
        expected = by_hand(model, ids, mask)
        for got, own in zip(
            (scores.induction, scores.previous_token, scores.duplicate_token), expected, strict=True
        ):
            assert got.shape == (3, 4)
            torch.testing.assert_close(got, own, rtol=1e-4, atol=1e-5)
    own = weights(model, PADDED, MASK)
    for row, (kept, got) in enumerate(zip(MASK == 1, shown.weights, strict=True)):
        assert shown.tokens[row] == [str(i) for i in PADDED[row, kept].tolist()]
        expected = torch.stack([own[2][row, 3], own[0][row, 1]])[:, kept][:, :, kept]
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_heads_that_there_are_not_are_named():
    model = tiny("llama")
    for heads, got in ((["L0.h1", "L3.h0"], r"\['L3.h0'\]"), ([], "none"), ("L0.h1", "L0.h1")):
        with pytest.raises(ValueError, match=f"heads must be some of L0.h0 to L2.h3, got {got}"):
            attention_patterns(model, IDS, heads)


def test_random_tokens_are_repeated_and_the_rest_is_shown(tmp_path):
    model = tiny("llama")
    seen = []
    handle = model.get_input_embeddings().register_forward_pre_hook(lambda m, a: seen.append(a[0]))

    class Starts:
        all_special_ids = (0, 1)

        def __call__(self, text):
            return {"input_ids": [1]}

    found = head_scores(model, tokenizer=Starts())
    handle.remove()
    (ids,) = seen
    assert ids.shape == (8, 65) and (ids[:, 0] == 1).all() and (ids[:, 1:] > 1).all()
    assert torch.equal(ids[:, 1:33], ids[:, 33:])
    again = head_scores(model, ids)
    assert torch.equal(again.induction, found.induction)
    assert not torch.equal(head_scores(model, seed=1).induction, found.induction)
    (name, best), *_ = found.top("induction", 3)
    assert best == found.induction.max() and found.induction[int(name[1]), int(name[4])] == best
    assert name in str(found).splitlines()[1] and len(str(found).splitlines()) == 6
    with pytest.raises(ValueError, match="kind must be one of .* got 'x'"):
        found.top("x")
    page = found.to_html(tmp_path / "heads.html")
    check_self_contained(page)
    assert page.count("<title>L") == 36


def test_attention_that_is_another_is_refused():
    model = tiny("llama")
    attention = parts(model, 1)[0]
    own = pytest.importorskip("transformers.modeling_utils").ALL_ATTENTION_FUNCTIONS

    def sinks(module, q, k, v, mask, **options):
        out, weights = own["sdpa"](module, q, k, v, mask, **options)
        return 0.9 * out, weights

    own.register("with_sinks", sinks)
    try:
        model.config._attn_implementation = "with_sinks"
        with pytest.raises(ValueError, match=r"attention of block 0 must be softmax\(q k\^T\) v"):
            head_scores(model, IDS)
    finally:
        del type(own)._global_mapping["with_sinks"]
    model.config._attn_implementation = "sdpa"
    head_scores(model, IDS)
    attention.forward = lambda *args, **options: type(attention).forward(
        attention, *args, **options
    )
    with pytest.raises(ValueError, match="head_scores: attention must run its class's forward"):
        head_scores(model, IDS)
    with pytest.raises(ValueError, match="call model.eval"):
        head_scores(tiny("llama").train(), IDS)
