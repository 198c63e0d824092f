# SPDX-License-Identifier: Apache-2.0
"""Edges between SAE features on a tiny decoder, against dense gradients of every pair."""

import pytest
import torch
from decoder_cases import IDS, hooks_of, tiny
from feature_cases import OTHER, PAIR, D, F, at_sites, close, dense, dictionaries, filled

from mikernels.circuits import feature_circuit, feature_graph, virtual_edges
from mikernels.nn import Crosscoder, GatedSAE

ORDER = ["0.mlp_in", "0.mlp_out", "0.residual", "1.attn_out", "2.residual"]


def linked(model, ids, cut):
    """Each site before and after it is cut out of the graph, and the numbers of the prompts."""
    blocks, before, after, handles = model.model.layers, {}, {}, []

    def pass_on(name, x):
        before[name] = x
        after[name] = x.detach().requires_grad_() if cut and name in ORDER else x
        return after[name]

    def leave(name):
        def hook(module, args, output):
            if isinstance(output, tuple):
                return (pass_on(name, output[0]), *output[1:])
            return pass_on(name, output)

        return hook

    def first(module, args, output):
        return output.detach().requires_grad_()

    handles.append(model.get_input_embeddings().register_forward_hook(first))
    for layer, block in enumerate(blocks):
        for module, place in ((block.mlp, "mlp_out"), (block, "residual"),
                              (block.self_attn, "attn_out")):  # fmt: skip
            handles.append(module.register_forward_hook(leave(f"{layer}.{place}")))
        name = f"{layer}.mlp_in"
        handles.append(
            block.mlp.register_forward_pre_hook(lambda m, args, n=name: (pass_on(n, args[0]),))
        )
    logits = model(ids).logits[:, -1]
    for handle in handles:
        handle.remove()
    return before, after, logits[:, PAIR[0]] - logits[:, PAIR[1]]


def changes(sae, clean, other, name):
    """Dense `[B, P, F]` codes less the counterfactual's, then error, then skip, `[B, P, d]`."""
    reads = name.replace("out", "in") if hasattr(sae, "w_skip") else name
    with torch.no_grad():
        moved = clean[name] - other[name]
        codes = sae.encode(clean[reads]).to_dense() - sae.encode(other[reads]).to_dense()
        skip = (clean[reads] - other[reads]) @ sae.w_skip.T if hasattr(sae, "w_skip") else None
        error = moved - codes @ sae.w_dec
        return codes, error if skip is None else error - skip, skip


@pytest.mark.parametrize("paths", ["direct", "all"])
def test_edges_are_products_of_gradients(paths):
    model, saes = tiny("llama"), dictionaries()
    by_name = dict(zip(ORDER, saes.values(), strict=True))
    clean, grads, _ = at_sites(model, IDS)
    other, _, _ = at_sites(model, OTHER)
    count = 3
    before, after, values = linked(model, IDS, paths == "direct")
    units = {}

    def add(row, seen, scale, target):
        """A gradient's parts, `[P, d]` at each source."""
        for source, g in seen.items():
            sae = by_name[source]
            codes, error, skip = (None if c is None else c[row] for c in changed[source])
            total = (codes * (g @ sae.w_dec.detach().T)).sum(0) * scale
            for u in total.nonzero()[:, 0].tolist():
                key = f"{source}.f{u}", target
                units.setdefault(key, [0.0, 0.0])[row] += float(total[u])
            for name, part in (("error", error), ("skip", skip)):
                if part is not None:
                    key = f"{source}.{name}", target
                    units.setdefault(key, [0.0, 0.0])[row] += float((part * g).sum() * scale)

    def pull(y, v, row, target):
        sources = [n for n in ORDER if n != target]
        found = torch.autograd.grad(
            y, [after[n] for n in sources], v, retain_graph=True, allow_unused=True
        )
        kept = zip(sources, found, strict=True)
        return {n: g[row].detach() for n, g in kept if g is not None}

    changed = {name: changes(sae, clean, other, name) for name, sae in by_name.items()}
    for name, sae in by_name.items():
        reads = name.replace("out", "in") if hasattr(sae, "w_skip") else name
        with torch.no_grad():
            active = sae.encode(clean[reads]).to_dense() != 0
            slopes = sae.w_enc.detach().clone()
            if isinstance(sae, GatedSAE):
                slopes *= sae.r_mag.exp()[:, None]
            gradient = grads[name] @ sae.w_dec.T
            sizes = (changed[name][0] * gradient).abs() * active
        for row in range(2):
            best = sizes[row].flatten().argsort(descending=True)[:count]
            for token, f in (divmod(int(i), F) for i in best):
                assert sizes[row, token, f] > 0
                y = (before if reads == name else after)[reads]
                v = torch.zeros_like(y)
                v[row, token] = slopes[f]
                if y.requires_grad:
                    scale = float(gradient[row, token, f])
                    add(row, pull(y, v, row, name), scale, f"{name}.f{f}")
    for row in range(2):
        add(row, pull(values[row], None, row, None), 1.0, "answer")
    expected = {key: sum(value) / 2 for key, value in units.items()}
    hooks = hooks_of(model)
    for batch_size in (1, 7):
        graph = feature_graph(
            model, saes, IDS, OTHER, PAIR, nodes=count, paths=paths, k=10_000,
            batch_size=batch_size,
        )  # fmt: skip
        found = {(e.source, e.target): e.score for e in graph.edges}
        sizes = [abs(e.score.value) for e in graph.edges]
        assert sizes == sorted(sizes, reverse=True)
        nonzero = {key: v for key, v in expected.items() if abs(v) > 1e-12}
        assert {key for key, s in found.items() if abs(s.value) > 1e-12} == nonzero.keys()
        for key, value in nonzero.items():
            assert found[key].value == pytest.approx(value, rel=1e-7, abs=1e-11)
            a, b = units[key]
            reach = 12.7062 * abs(a - b) / 2
            assert found[key].high - found[key].value == pytest.approx(reach, rel=1e-3, abs=1e-8)
        kinds = {target.rpartition(".")[0] for _, target in found}
        assert {"2.residual", "1.attn_out", "0.residual", ""} <= kinds
        # past the last residual stream nothing goes straight to the answer
        sources = {source.rpartition(".")[0] for source, target in found if target == "answer"}
        assert sources == ({"2.residual"} if paths == "direct" else set(ORDER))
    alone = feature_circuit(model, saes, IDS, OTHER, PAIR)
    for name, scores in graph.circuit.sites.items():
        close(dense(scores), dense(alone.sites[name]))
    top = feature_graph(model, saes, IDS, OTHER, PAIR, nodes=count, paths=paths, k=5)
    expected = [[e for e in graph.edges if (e.target == "answer") == kind][:5] for kind in (0, 1)]
    names = {(e.source, e.target) for edges in expected for e in edges}
    assert {(e.source, e.target) for e in top.edges} == names
    assert len(top.to_rows()) == 10 and top.edges[0].source in str(top)
    assert hooks_of(model) == hooks and all(p.requires_grad for p in model.parameters())


def test_an_saes_error_is_all_that_it_does_not_pass_on():
    """Of an SAE without features that write, nothing else reaches the site after it."""
    model, saes = tiny("gpt2"), {0: dictionaries()["0.residual"], 1: dictionaries()["0.residual"]}
    with torch.no_grad():
        saes[0].w_dec.zero_()
    graph = feature_graph(model, saes, IDS[:1], OTHER[:1], PAIR, nodes=4)
    assert {e.source for e in graph.edges if e.target != "answer"} == {"0.residual.error"}
    assert all(e.score.low != e.score.low for e in graph.edges)


def test_what_has_no_edges_is_refused():
    model = tiny("llama")
    several = {(0, 1, 2): filled(Crosscoder(3 * D, F, 6, n_layers=3), 5)}
    with pytest.raises(ValueError, match="feature_graph: saes must be of one site each, got a C"):
        feature_graph(model, several, IDS, OTHER, PAIR)
    for options in ({"paths": "some"}, {"nodes": 0}, {"k": 0}):
        with pytest.raises(ValueError, match=f"feature_graph: {next(iter(options))} must be"):
            feature_graph(model, dictionaries(), IDS, OTHER, PAIR, **options)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_virtual_edges_are_products_of_weights(kind):
    model, saes = tiny(kind), dictionaries()
    saes["2.mlp_out"] = saes.pop("0.mlp_out")
    order = ["0.mlp_in", "0.residual", "1.attn_out", "2.residual", "2.mlp_out"]
    rows = {
        n: (s.w_dec.detach(), s.w_enc.detach()) for n, s in zip(order, saes.values(), strict=True)
    }
    if kind == "llama":
        gain = model.model.layers[2].post_attention_layernorm.weight.detach()
    else:
        gain = model.transformer.h[2].ln_2.weight.detach()
    expected = {}
    # into the transcoder through the norm before its MLP, into the stream as it is
    for u, v in (("0.residual", "2.mlp_out"), ("1.attn_out", "2.mlp_out"),
                 ("0.residual", "2.residual"), ("1.attn_out", "2.residual"),
                 ("2.mlp_out", "2.residual")):  # fmt: skip
        w = rows[u][0]
        if v == "2.mlp_out":
            w = (w - w.mean(1, keepdim=True) if kind == "gpt2" else w) * gain
        for (i, j), x in zip(torch.cartesian_prod(torch.arange(F), torch.arange(F)).tolist(),
                             (w @ rows[v][1].T).flatten().tolist(), strict=True):  # fmt: skip
            expected[f"{u}.f{i}", f"{v}.f{j}"] = x
    for by, strength in (("abs", abs), ("value", float)):
        found = virtual_edges(model, saes, k=25, by=by)
        best = sorted(expected, key=lambda pair: -strength(expected[pair]))[:25]
        assert [edge[:2] for edge in found] == best
        assert [e.weight for e in found] == pytest.approx([expected[pair] for pair in best])
    with pytest.raises(ValueError, match="virtual_edges: saes must be at a site that is written"):
        virtual_edges(model, {"1.attn_out": saes["1.attn_out"]})
