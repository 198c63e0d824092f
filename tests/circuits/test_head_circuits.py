# SPDX-License-Identifier: Apache-2.0
"""Logit lens, OV and QK circuits, against the whole matrices in double precision."""

import pytest
import torch
from decoder_cases import IDS, hooks_of, letters, made, tiny
from feature_cases import D, F, filled
from lens_cases import lens

from mikernels.circuits import logit_lens, ov_circuit, qk_circuit
from mikernels.circuits.features import readout as room
from mikernels.nn import Crosscoder, TopKSAE

V, DH = 50, 6


def fold(rows, gain, centred):
    rows = rows - rows.mean(-1, keepdim=True) if centred else rows
    return rows * gain


def weights(kind, model, layer, head):
    """By hand: embedding, unembedding `[V, d]`, the norms before attention, after it and at the end
    as functions, and W_Q, W_K, W_V `[d, dh]`, W_O `[dh, d]` of a head."""
    if kind == "gpt2":
        block, final = model.transformer.h[layer], model.transformer.ln_f
        mine = slice(head * DH, head * DH + DH)
        q, k, v = (part[:, mine] for part in block.attn.c_attn.weight.split(24, 1))
        norm, after, o = block.ln_1, None, block.attn.c_proj.weight[mine]
        plus, centred = 0, True
        e, u = model.transformer.wte.weight, model.lm_head.weight
    elif kind == "lens":
        block, final = model.blocks[layer], model.ln_final
        attn = block.attn
        q, k, v, o = (w[head] for w in (attn.W_Q, attn.W_K, attn.W_V, attn.W_O))
        norm, after, plus, centred = block.ln1, None, 0, True
        e, u = model.W_E, model.W_U.T
    else:
        block, final = model.model.layers[layer], model.model.norm
        attn = block.self_attn
        mine, group = (slice(h * DH, h * DH + DH) for h in (head, head // 2))
        q = attn.q_proj.weight[mine].T
        k, v = (m.weight[group].T for m in (attn.k_proj, attn.v_proj))
        o, norm, centred = attn.o_proj.weight[:, mine].T, block.input_layernorm, False
        plus = 1 if kind == "gemma2" else 0
        after = block.post_attention_layernorm if kind == "gemma2" else None
        e, u = model.model.embed_tokens.weight, model.lm_head.weight

    def function(module):
        if module is None:
            return lambda rows: rows
        gain = module.w if kind == "lens" else module.weight
        return lambda rows: fold(rows, gain.detach() + plus, centred)

    tensors = [t.detach() for t in (e, u, q, k, v, o)]
    return *tensors, *map(function, (norm, after, final))


KINDS = ("llama", "gpt2", "gemma2", "lens")


def model_of(kind):
    return lens("gpt2") if kind == "lens" else tiny(kind)


def best(matrix, k, by="value"):
    flat = matrix.abs().flatten() if by == "abs" else matrix.flatten()
    at = flat.argsort(descending=True)[:k]
    return [divmod(int(i), matrix.shape[1]) for i in at], matrix.flatten()[at]


@pytest.mark.parametrize("kind", KINDS)
def test_circuits_of_heads_are_the_products_of_their_weights(kind, monkeypatch):
    # several pieces of the vocabulary
    monkeypatch.setattr(room, "ROWS", 7)
    model = model_of(kind)
    before = hooks_of(model)
    layer, head = 1, 2
    e, u, q, k, v, o, norm, after, final = weights(kind, model, layer, head)
    ov = final(after(norm(e) @ v @ o)) @ (u - u.mean(0)).T
    found = ov_circuit(model, "L1.h2", k=30)
    places, scores = best(ov, 30)
    assert list(zip(found.pairs.rows.tolist(), found.pairs.cols.tolist(), strict=True)) == places
    torch.testing.assert_close(found.pairs.values, scores)
    values = torch.linalg.eigvals(ov)
    assert found.copying == pytest.approx(float(values.real.sum() / values.abs().sum()), abs=1e-9)
    assert -1 < found.copying < 1
    qk = norm(e) @ q @ (norm(e) @ k).T / DH**0.5
    found = qk_circuit(model, "L1.h2", k=30, by="abs")
    places, scores = best(qk, 30, "abs")
    assert list(zip(found.pairs.rows.tolist(), found.pairs.cols.tolist(), strict=True)) == places
    torch.testing.assert_close(found.pairs.values, scores)
    # features and tokens
    sae = filled(TopKSAE(D, F, 5, dtype=torch.float64), 1)
    later = filled(TopKSAE(D, F, 5, dtype=torch.float64), 2)
    found = ov_circuit(model, "L1.h2", inputs=sae, outputs=later, k=9)
    w_dec, w_enc = sae.w_dec.detach(), later.w_enc.detach()
    places, scores = best(after(norm(w_dec) @ v @ o) @ w_enc.T, 9)
    assert found.names == tuple((f"f{i}", f"f{j}") for i, j in places)
    torch.testing.assert_close(found.pairs.values, scores)
    assert found.copying is None
    found = ov_circuit(model, "L1.h2", inputs=[4, 9], outputs=torch.tensor([30, 2, 7]), k=100)
    expected = ov[[4, 9]][:, [30, 2, 7]]
    torch.testing.assert_close(found.pairs.to_dense(), expected)
    assert set(found.names) == {(str(i), str(j)) for i in (4, 9) for j in (30, 2, 7)}
    found = qk_circuit(model, "L1.h2", queries=w_dec[:5], keys=sae, k=4)
    places, scores = best(norm(w_dec[:5]) @ q @ (norm(w_dec) @ k).T / DH**0.5, 4)
    assert found.names == tuple((str(i), f"f{j}") for i, j in places)
    torch.testing.assert_close(found.pairs.values, scores)
    assert hooks_of(model) == before
    assert len(found.to_rows()) == 4 and "QK of L1.h2\nquery  key" in str(found)


@pytest.mark.parametrize("kind", KINDS)
def test_a_features_tokens_are_those_of_the_whole_product(kind, monkeypatch):
    monkeypatch.setattr(room, "ROWS", 7)
    model = model_of(kind)
    *_, u, _, _, _, _, _, _, final = (None, *weights(kind, model, 0, 0)[1:])
    sae = filled(TopKSAE(D, F, 5, dtype=torch.float64), 1)
    scores = final(sae.w_dec.detach()) @ (u - u.mean(0)).T
    for features in (None, [3, 17, 3]):
        found = logit_lens(model, sae, features, k=6)
        own = scores if features is None else scores[features]
        assert found.names == tuple(f"f{f}" for f in features or range(F))
        for got, ids, side in (
            (found.promoted_scores, found.promoted, own),
            (-found.suppressed_scores, found.suppressed, -own),
        ):
            values, places = side.topk(6)
            torch.testing.assert_close(got, values)
            assert torch.equal(ids, places)
    assert found.tokens(1)[0] == (str(int(scores[17].argmax())), pytest.approx(scores[17].max()))
    assert found.tokens(1, True)[0][0] == str(int(scores[17].argmin()))
    again = logit_lens(model, sae.w_dec.detach()[[3]], k=V)
    assert again.names == ("0",) and sorted(again.promoted[0].tolist()) == list(range(V))
    assert len(found.to_rows()) == 3 and str(found).splitlines()[2].startswith("f17")


def test_scores_are_what_a_direction_adds_to_the_logits():
    """With the final norm's scale as it is: by the model itself."""
    model = tiny("gpt2")
    with torch.no_grad():
        blocks = []
        hook = model.transformer.ln_f.register_forward_pre_hook(lambda m, a: blocks.append(a[0]))
        model(IDS)
        hook.remove()
    x = blocks[0].requires_grad_()
    v = torch.linspace(-1, 1, D, dtype=torch.float64)
    found = logit_lens(model, v[None], k=V)
    scale = (x.var(-1, unbiased=False) + 1e-5).sqrt()[0, -1]
    centred = (x - x.mean(-1, keepdim=True)) / scale.detach()
    logits = model.lm_head(centred * model.transformer.ln_f.weight + model.transformer.ln_f.bias)
    own = torch.stack(
        [torch.autograd.grad(logit, x, retain_graph=True)[0][0, -1] @ v for logit in logits[0, -1]]
    )
    own = (own - own.mean()) * scale
    torch.testing.assert_close(found.promoted_scores[0], own[found.promoted[0]])


def test_names_are_texts_with_a_tokenizer():
    model, words = tiny("llama"), letters()
    found = ov_circuit(model, "L0.h1", inputs=["a", "d"], k=3, tokenizer=words)
    assert {a for a, _ in found.names} <= {"'a'", "'d'"}
    shown = str(logit_lens(model, torch.ones(1, D, dtype=torch.float64), k=2, tokenizer=words))
    assert shown.splitlines()[0].split() == ["promotes", "suppresses"] and "'" in shown
    with pytest.raises(TypeError, match="ov_circuit: tokens 'a' must be a token id without"):
        ov_circuit(model, "L0.h1", inputs=["a"])


def test_what_is_no_product_of_weights_is_refused():
    model = tiny("llama")
    for head in ("L3.h0", "L0.h4", "l0.h0", 7):
        with pytest.raises(ValueError, match="ov_circuit: head must be one of"):
            ov_circuit(model, head)
    wide = torch.ones(2, 7)
    for side, error in ((wide, ValueError), ("model", TypeError), (1.5, TypeError), ([], TypeError),
                        ([60], ValueError), ([True], ValueError)):  # fmt: skip
        with pytest.raises(error, match="qk_circuit: "):
            qk_circuit(model, "L0.h0", keys=side)
    with pytest.raises(ValueError, match="k must be at least 1"):
        ov_circuit(model, "L0.h0", k=0)
    with pytest.raises(ValueError, match=r"norms its queries or keys \(q_norm\)"):
        qk_circuit(made("qwen3"), "L0.h0")
    crosscoder = Crosscoder(3 * D, F, 5, n_layers=3)
    for bad, error, message in (
        (crosscoder, ValueError, "of Crosscoder; give the rows of one layer"),
        (wide, ValueError, r"\[n, 24\], got \[2, 7\]"),
        ([1.0], TypeError, "got list"),
        (torch.full((1, D), torch.nan), ValueError, "directions must be finite"),
    ):
        with pytest.raises(error, match=f"logit_lens: .*{message}"):
            logit_lens(model, bad)
    with pytest.raises(ValueError, match=r"features must be in 0\.\.39, got 40"):
        logit_lens(model, TopKSAE(D, F, 5), [40])
    with pytest.raises(ValueError, match=r"k must be in 1\.\.50 \(tokens\), got 51"):
        logit_lens(model, TopKSAE(D, F, 5), k=51)
    # another arithmetic between the norm and the logits
    model.lm_head.register_forward_pre_hook(lambda m, args: (args[0] * 2,))
    with pytest.raises(ValueError, match="its unembedding reads something else than LlamaRMSNorm"):
        logit_lens(model, TopKSAE(D, F, 5))
