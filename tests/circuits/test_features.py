# SPDX-License-Identifier: Apache-2.0
"""Circuits of SAE features on tiny decoders, against dense sums in double precision."""

import pytest
import torch
from decoder_cases import IDS, ROWS, hooks_of, padded, tiny
from feature_cases import OTHER, PAIR, D, F, at_sites, close, dense, dictionaries, filled
from lens_cases import lens

from mikernels.circuits import feature_circuit, feature_graph, rules
from mikernels.nn import Crosscoder, CrossLayerTranscoder, SkipTranscoder, TopKSAE


def check_site(scores, moved, codes, rows, skip, g):
    """Of activations less the counterfactual's, with dense codes and rows `[F, d]`."""
    features = codes * torch.einsum("bpd,fd->bpf", g, rows)
    error = moved - torch.einsum("bpf,fd->bpd", codes, rows)
    error = error if skip is None else error - skip
    close(dense(scores), features)
    close(scores.error, (error * g).sum(-1))
    assert (scores.skip is None) == (skip is None)
    if skip is not None:
        close(scores.skip, (skip * g).sum(-1))
    close(scores.whole, (moved * g).sum(-1))
    assert features.abs().max() > 1e-3 and scores.error.abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("corrupted", [None, OTHER])
def test_scores_are_the_change_of_each_feature_times_its_gradient(kind, corrupted):
    model = tiny(kind)
    saes, before = dictionaries(), hooks_of(model)
    x, grads, values = at_sites(model, IDS)
    circuit = feature_circuit(model, saes, IDS, corrupted, PAIR, batch_size=1, k=7)
    close(circuit.values, values)
    theirs = None
    if corrupted is not None:
        theirs, _, other = at_sites(model, corrupted)
        close(circuit.counterfactual_values, other)
    order = ["0.mlp_in", "0.mlp_out", "0.residual", "1.attn_out", "2.residual"]
    assert list(circuit.sites) == order
    for name, sae in zip(order, saes.values(), strict=True):
        reads = name.replace("out", "in") if isinstance(sae, SkipTranscoder) else name
        skips = isinstance(sae, SkipTranscoder)
        with torch.no_grad():
            codes = sae.encode(x[reads]).to_dense()
            skip = sae.past_codes(x[reads]) if skips else None
            moved = x[name] - sae.b_dec
            if theirs is not None:
                codes = codes - sae.encode(theirs[reads]).to_dense()
                skip = skip - sae.past_codes(theirs[reads]) if skips else None
                moved = x[name] - theirs[name]
            check_site(circuit.sites[name], moved, codes, sae.w_dec, skip, grads[name])
    everything = torch.cat([dense(s).sum(1).mean(0) for s in circuit.sites.values()])
    best = everything.abs().argsort(descending=True)[:7].tolist()
    assert [n.name for n in circuit.ranking] == [f"{order[i // F]}.f{i % F}" for i in best]
    for node, i in zip(circuit.ranking, best, strict=True):
        assert node.score.value == pytest.approx(float(everything[i]), abs=1e-12)
        units = dense(circuit.sites[node.site])[..., node.feature]
        reach = 12.7062 * float(units.sum(1).std()) / 2**0.5
        assert node.score.high - node.score.value == pytest.approx(reach, rel=1e-4)
        assert node.at == divmod(int(units.abs().argmax()), 5)
        assert circuit.token(node) == str(int(IDS[node.at]))
    errors = {n.name: n.score.value for n in circuit.errors}
    names = [f"{name}.error" for name in order]
    assert list(errors) == [*names[:2], "0.mlp_out.skip", *names[2:]]
    mean = circuit.sites["2.residual"].error.sum(1).mean().item()
    assert errors["2.residual.error"] == pytest.approx(mean)
    assert len(circuit.to_rows()) == 13 and str(circuit).count("\n") == 14
    assert hooks_of(model) == before
    for module in (model, *saes.values()):
        assert all(p.grad is None and p.requires_grad for p in module.parameters())


def test_dictionaries_of_several_sites():
    model, layers = tiny("llama"), 3
    double = {"dtype": torch.float64, "n_layers": layers}
    crosscoder = filled(Crosscoder(layers * D, F, 6, **double), 5)
    clt = filled(CrossLayerTranscoder(layers * D, F, 3, **double), 6)
    sites = {"residual": crosscoder, "mlp_out": clt}
    saes = {tuple(f"{i}.{name}" for i in range(layers)): sae for name, sae in sites.items()}
    x, grads, _ = at_sites(model, IDS)
    theirs, _, _ = at_sites(model, OTHER)
    circuit = feature_circuit(model, saes, IDS, OTHER, PAIR)
    assert list(circuit.sites) == [f"{i}.{n}" for i in range(3) for n in ("mlp_out", "residual")]
    for name, sae in sites.items():
        reads = name.replace("out", "in")
        with torch.no_grad():
            codes = [
                sae.encode(torch.cat([side[f"{i}.{reads}"] for i in range(layers)], -1)).to_dense()
                for side in (x, theirs)
            ]
            moved = codes[0] - codes[1]
            for i in range(layers):
                if name == "residual":
                    rows = sae.w_dec.view(F, layers, D)[:, i] / sae.layer_scale[i]
                else:
                    # of each layer up to it, the matrix that writes there
                    own = [sae.decoder(n).view(F, layers - n, D)[:, i - n] for n in range(i + 1)]
                    rows = torch.zeros(layers * F, D, dtype=torch.float64)
                    rows[: (i + 1) * F] = torch.cat(own) / sae.target_scale[i]
                    assert moved[..., (i + 1) * F :].any() or i == layers - 1
                site = f"{i}.{name}"
                own_codes = moved if name == "residual" else moved.clone()
                if name == "mlp_out":
                    own_codes[..., (i + 1) * F :] = 0
                difference = x[site] - theirs[site]
                check_site(circuit.sites[site], difference, own_codes, rows, None, grads[site])


def test_padding_takes_no_part():
    model, saes = tiny("llama"), dictionaries()
    given = padded("mixed")
    other = {**given, "input_ids": given["input_ids"].clone()}
    for row in range(3):
        other["input_ids"][row, given["attention_mask"][row].argmax()] = 20 + row
    whole = feature_circuit(model, saes, given, other, PAIR, batch_size=2, method="ig", steps=2)
    for row, tokens in enumerate(ROWS):
        ids = torch.tensor([[20 + row, *tokens[1:]]])
        alone = feature_circuit(
            model, saes, torch.tensor([tokens]), ids, PAIR, method="ig", steps=2
        )
        kept = given["attention_mask"][row] == 1
        for name, scores in whole.sites.items():
            close(dense(scores)[row, kept], dense(alone.sites[name])[0])
            close(scores.error[row, kept], alone.sites[name].error[0])
            assert not dense(scores)[row, ~kept].any() and not scores.error[row, ~kept].any()
        assert whole.tokens[row] == [str(token) for token in tokens]
    top = whole.ranking[0]
    row, position = top.at
    assert whole.token(top) == str(int(given["input_ids"][row, position]))


@pytest.mark.parametrize("corrupted", [None, OTHER])
def test_integrated_gradients_add_up_to_what_the_site_does(corrupted):
    """Once the site is what it was in the counterfactual, or the bias: by a patched run."""
    model, saes = tiny("gpt2"), dictionaries()
    theirs = None if corrupted is None else at_sites(model, corrupted)[0]
    _, _, values = at_sites(model, IDS)
    few, many = (
        feature_circuit(model, saes, IDS, corrupted, PAIR, method="ig", steps=steps)
        for steps in (10, 40)
    )
    blocks, before = model.transformer.h, hooks_of(model)
    modules = {
        "0.mlp_in": blocks[0].mlp, "0.mlp_out": blocks[0].mlp, "0.residual": blocks[0],
        "1.attn_out": blocks[1].attn, "2.residual": blocks[2],
    }  # fmt: skip
    for (name, module), sae in zip(modules.items(), saes.values(), strict=True):
        there = sae.b_dec.expand(2, 5, D) if theirs is None else theirs[name]

        def leave(module, args, output, there=there):
            return (there, *output[1:]) if isinstance(output, tuple) else there

        if name.endswith("mlp_in"):
            hook = module.register_forward_pre_hook(lambda m, args, there=there: (there,))
        else:
            hook = module.register_forward_hook(leave)
        with torch.no_grad():
            logits = model(IDS).logits[:, -1]
        hook.remove()
        effect = values - (logits[:, PAIR[0]] - logits[:, PAIR[1]])
        away = []
        for circuit in (few, many):
            scores = circuit.sites[name]
            total = dense(scores).sum((1, 2)) + scores.error.sum(1)
            total = total if scores.skip is None else total + scores.skip.sum(1)
            away.append((total - effect).abs().max() / effect.abs().max())
        # of second order
        assert away[1] < min(0.1 * away[0], 1e-2)
    assert hooks_of(model) == before and all(p.requires_grad for p in model.parameters())


def test_the_predicted_token_is_that_of_the_prompt():
    model, saes = tiny("llama"), {1: dictionaries()["0.residual"]}
    with torch.no_grad():
        tokens, others = (model(ids).logits[:, -1].argmax(-1) for ids in (IDS, OTHER))
    assert not torch.equal(tokens, others)
    options = {"method": "ig", "steps": 2}
    found = feature_circuit(model, saes, IDS, OTHER, **options)
    expected = feature_circuit(model, saes, IDS, OTHER, tokens, **options)
    close(found.counterfactual_values, expected.counterfactual_values)
    close(dense(found.sites["1.residual"]), dense(expected.sites["1.residual"]))
    assert found.label == "logit of the predicted token"


def test_rules_and_low_precision():
    model, saes = tiny("llama"), {"1.residual": dictionaries()["0.residual"]}
    with rules(model, "gim"):
        _, grads, _ = at_sites(model, IDS)
    circuit = feature_circuit(model, saes, IDS, OTHER, PAIR, rules="gim")
    x, _, _ = at_sites(model, IDS)
    theirs, plain, _ = at_sites(model, OTHER)
    moved, g = x["1.residual"] - theirs["1.residual"], grads["1.residual"]
    close(circuit.sites["1.residual"].whole, (moved * g).sum(-1))
    assert circuit.rules is not None and (g - plain["1.residual"]).abs().max() > 1e-3
    exact = feature_circuit(model, saes, IDS, OTHER, PAIR).sites["1.residual"]
    for model_dtype, dtype in (("float32", "float32"), ("float64", "bfloat16"),
                               ("bfloat16", "float32"), ("bfloat16", "bfloat16")):  # fmt: skip
        sae = dictionaries()["0.residual"].to(getattr(torch, dtype))
        narrow = tiny("llama", getattr(torch, model_dtype))
        got = feature_circuit(narrow, {"1.residual": sae}, IDS, OTHER, PAIR).sites["1.residual"]
        assert got.scores.dtype == torch.promote_types(getattr(torch, model_dtype), torch.float32)
        limit = 1e-3 if "bfloat16" not in (model_dtype, dtype) else 0.2
        away = (got.whole - exact.whole).abs().max() / exact.whole.abs().max()
        assert away < limit


def test_hooked_transformers():
    model, saes = lens("llama"), dictionaries()
    saes = {"0.mlp_out": saes["0.mlp_out"], "0.residual": saes["0.residual"], 1: saes[2]}
    names = {"0.mlp_out": "hook_mlp_out", "0.residual": "hook_resid_post",
             "1.residual": "hook_resid_post"}  # fmt: skip
    sides = []
    for ids in (IDS, OTHER):
        x = {}

        def keep(tensor, hook, x=x):
            x[hook.name] = tensor

        at = [f"blocks.{site[0]}.{name}" for site, name in names.items()]
        logits = model.run_with_hooks(ids, fwd_hooks=[(name, keep) for name in at])[:, -1]
        values = logits[:, PAIR[0]] - logits[:, PAIR[1]]
        found = [x[name] for name in at]
        sides.append((found, torch.autograd.grad(values.sum(), found), values))
    circuit = feature_circuit(model, saes, IDS, OTHER, PAIR)
    close(circuit.values, sides[0][2].detach())
    for i, site in enumerate(names):
        moved = (sides[0][0][i] - sides[1][0][i]).detach()
        close(circuit.sites[site].whole, (moved * sides[0][1][i]).sum(-1))
    # the last residual stream alone makes the answer
    whole = feature_circuit(model, saes, IDS, OTHER, PAIR, method="ig", steps=60).sites[
        "1.residual"
    ]
    total = dense(whole).sum((1, 2)) + whole.error.sum(1)
    change = (sides[0][2] - sides[1][2]).detach()
    assert (total - change).abs().max() < 1e-2 * change.abs().max()
    graph = feature_graph(model, saes, IDS, OTHER, PAIR, nodes=2)
    assert {e.target.rpartition(".")[0] for e in graph.edges} == {"", "0.residual", "1.residual"}


def test_features_that_are_never_active_and_a_caller_without_gradients():
    model, dead = tiny("llama"), filled(TopKSAE(D, F, 5, dtype=torch.float64), 1)
    with torch.no_grad():
        dead.b_enc.fill_(-1e3)
    with torch.inference_mode():
        circuit = feature_circuit(model, {0: dead}, IDS[:1], OTHER[:1], PAIR)
        graph = feature_graph(model, {0: dead, 1: dead}, IDS[:1], OTHER[:1], PAIR)
    assert circuit.ranking == () and [n.name for n in circuit.errors] == ["0.residual.error"]
    scores = circuit.sites["0.residual"]
    close(scores.error, scores.whole)
    assert not len(scores.features) and circuit.to_rows()[0]["low"] is None
    assert "1 prompt" in str(circuit) and "interval" not in str(circuit)
    # what reaches the answer past the second site comes from that
    assert {(e.source, e.target) for e in graph.edges} == {("1.residual.error", "answer")}


class Crooked(TopKSAE):
    """Its output is not linear in its codes."""

    def decode(self, codes):
        return super().decode(codes) * (1 + 1e-6 * codes.values.sum(-1, keepdim=True))


def test_what_does_not_add_up_is_refused():
    model = tiny("llama")
    before = hooks_of(model)
    sae = filled(Crooked(D, F, 5, dtype=torch.float64), 1)
    with pytest.raises(ValueError, match="features, error and bias of Crooked must add up"):
        feature_circuit(model, {"1.residual": sae}, IDS, OTHER, PAIR)
    assert hooks_of(model) == before and all(p.requires_grad for p in model.parameters())
    wild = filled(TopKSAE(D, F, 5, dtype=torch.float64), 1)
    with torch.no_grad():
        wild.w_dec[:, 3] = torch.nan
    with pytest.raises(ValueError, match="must be finite, got nan"):
        feature_circuit(model, {"1.residual": wild}, IDS, OTHER, PAIR)


SAE = TopKSAE(D, F, 5)
BAD = {
    "none": ({}, "saes must be a mapping of sites"),
    "list": ([SAE], "saes must be a mapping of sites"),
    "module": ({1: torch.nn.Linear(D, F)}, "got Linear at 1.residual; load one of SAELens"),
    "name": ({"model.norm": SAE}, "saes must be at sites such as"),
    "layer": ({3: SAE}, r"layers 0\.\.2, got 3.residual"),
    "width": ({1: TopKSAE(16, F, 5)}, "the model's width at 1.residual, 24, got 16"),
    "twice": ({1: SAE, "1.residual": SAE}, "one SAE for each site, got 1.residual again"),
    "transcoder": ({"1.residual": SkipTranscoder(D, F, 4)}, "NUMBER.mlp_out"),
    "tuple": ({(0, 1): SAE}, "saes must name 1 sites for a TopKSAE"),
    "layers": ({(0, 1): Crosscoder(3 * D, F, 5, n_layers=3)}, "name 3 sites for a Crosscoder"),
}


@pytest.mark.parametrize("name", BAD)
def test_saes_that_do_not_fit_are_refused_before_the_model_runs(name):
    model = tiny("llama")
    model.register_forward_pre_hook(lambda *args: pytest.fail("it ran"))
    saes, message = BAD[name]
    with pytest.raises((TypeError, ValueError), match=f"feature_circuit: .*{message}"):
        feature_circuit(model, saes, IDS, OTHER, PAIR)
    for options in ({"method": "acdc"}, {"k": 0}, {"steps": 0}, {"batch_size": 0}):
        with pytest.raises(ValueError, match=f"feature_circuit: {next(iter(options))} must be"):
            feature_circuit(model, {1: SAE}, IDS, OTHER, PAIR, **options)
    with pytest.raises(ValueError, match="feature_circuit: corrupted must differ from clean"):
        feature_circuit(model, {1: SAE}, IDS, IDS, PAIR)
