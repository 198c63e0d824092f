# SPDX-License-Identifier: Apache-2.0
"""find_circuit against autograd with a zero added to what each reader reads."""

from contextlib import ExitStack
from functools import reduce

import pytest
import torch
from decoder_cases import HARD, IDS, OPTIONS, hooks_of, made, padded, parts, tiny
from lens_cases import lens

from mikernels.circuits import find_circuit, gim_probe
from mikernels.circuits.recording import Gradients, _sum
from mikernels.models.decoder import find_decoder
from mikernels.models.readers import wire
from mikernels.models.rules import rules
from mikernels.values.intervals import resampled_counts

PAIR = (7, 8)
CORRUPTED = torch.tensor([[3, 20, 15, 9, 2], [6, 5, 21, 8, 9]])
SIDES = {
    "clean": torch.tensor([[1] * 5, [0, 1, 1, 1, 1]]),
    "corrupted": torch.tensor([[1] * 5, [1, 1, 1, 1, 0]]),
}
LENSES = ("gpt2, folded", "llama, split", "llama, ungrouped", "qwen3", "pythia", "solu", "bloom")
# the names of rules need attention of transformers' registry
PLAIN = ("gpt_bigcode", "gptj", "cohere", "olmo")


def _first(args, kwargs):
    return args[0] if args else kwargs["hidden_states"]


def _number(logits):
    return logits[:, -1, PAIR[0]] - logits[:, -1, PAIR[1]]


def _logits(model, ids):
    out = model(ids)
    return getattr(out, "logits", out)


def _run(model, wiring, ids, zeros=None, preset=None):
    """(numbers, what each writer wrote `[B, P, W, d]`, gradients of the zeros)."""
    graph, parts = wiring.graph, []
    scales = {}
    with ExitStack() as stack:

        def add(hook):
            stack.callback(hook.remove)

        def start(module, args, kwargs):
            parts.append(_first(args, kwargs).detach()[:, :, None])

        for i, reading in enumerate(wiring.layers):
            block, seen = reading.block, {}
            first = graph.first_reader(i)
            if i == 0:
                add(block.module.register_forward_pre_hook(start, with_kwargs=True))

            def enter(module, args, kwargs, seen=seen):
                seen["x"] = _first(args, kwargs)

            def after(module, args, output, i=i):
                # whatever the norm does: the ratio of what it makes of the sum of the heads
                scales[i] = output.detach(), args[0].detach()

            def z(value, i=i, seen=seen, reading=reading):
                w = wiring.w_o[i]
                rows = value.shape[:2]
                heads = value.detach().reshape(*rows, *w.shape[:2])
                seen["heads"] = torch.einsum("bphe,hed->bphd", heads, w)

            def attend(module, args, output, i=i, seen=seen, reading=reading):
                heads = seen["heads"]
                if reading.written is not None:
                    made, summed = scales[i]
                    # of RMS norms, the only ones here
                    heads = heads * (made / summed)[:, :, None]
                parts.append(heads)

            def feed(module, args, output):
                out = output[0] if isinstance(output, tuple) else output
                parts.append(out.detach().reshape(parts[0][:, :, 0].shape)[:, :, None])

            add(block.module.register_forward_pre_hook(enter, with_kwargs=True))
            stack.callback(block.z.hook(z))
            if reading.written is not None:
                add(reading.written.module.register_forward_hook(after))
            add(reading.flow.attention_writer.register_forward_hook(attend))
            if reading.flow.mlp_writer is not None:
                add(reading.flow.mlp_writer.register_forward_hook(feed))
            if zeros is None:
                continue

            def anew(made, first=first, seen=seen, reading=reading):
                at, found = first, {}
                for p in reading.projections:
                    n = len(p.weight)
                    if p.part in made:
                        x = seen["x"][:, :, None] + zeros[:, :, at : at + n]
                        y = x if reading.norm is None else reading.norm.module(x)
                        q = torch.einsum("bphd,hde->bphe", y, p.weight)
                        found[p.part] = q if p.bias is None else q + p.bias
                    at += n
                return found

            for remove in reading.hook(anew):
                stack.callback(remove)
            if block.mlp_reader is not None:
                last = first + graph.layers[i].readers - 1
                norm = reading.mlp_norm

                def shifted(module, args, kwargs, last=last, norm=norm, seen=seen, reading=reading):
                    y = _first(args, kwargs)
                    if norm is None:
                        new = y + zeros[:, :, last].reshape(y.shape)
                    else:
                        x = seen[norm.module] if norm.module in seen else seen["x"]
                        new = norm.module(x + zeros[:, :, last].reshape(x.shape))
                    return ((new, *args[1:]), kwargs) if args else (args, {"hidden_states": new})

                def read(module, args, kwargs, seen=seen):
                    seen.setdefault(module, _first(args, kwargs))

                if norm is not None and norm.module is not getattr(reading.norm, "module", None):
                    add(norm.module.register_forward_pre_hook(read, with_kwargs=True))
                add(block.mlp_reader.register_forward_pre_hook(shifted, with_kwargs=True))
        if zeros is not None:

            def end(module, args, kwargs):
                return (args[0] + zeros[:, :, -1], *args[1:]), kwargs

            add(wiring.final.register_forward_pre_hook(end, with_kwargs=True))
        with wiring.decoder.whole():
            values = _number(_logits(model, ids))
            grads = None if zeros is None else torch.autograd.grad(values.sum(), zeros)[0]
    return values.detach(), torch.cat(parts, 2), grads


def oracle(model, ids, corrupted):
    wiring = wire(find_decoder(model, "test", ""))
    graph = wiring.graph
    zeros = torch.zeros(*ids.shape, len(graph.readers), graph.d, dtype=torch.float64)
    zeros.requires_grad_()
    _, clean, grads = _run(model, wiring, ids, zeros)
    _, other, _ = _run(model, wiring, corrupted)
    scores = torch.einsum("bpwd,bprd->bpwr", clean - other, grads) * graph.allowed()
    return scores


def close(got, expected):
    # transformers' norms compute in fp32, also in a model in fp64
    torch.testing.assert_close(got.double(), expected, rtol=2e-5, atol=2e-6 * expected.abs().max())


@pytest.mark.parametrize("name", [*OPTIONS, *(f"lens {kind}" for kind in LENSES)])
def test_edges_of_every_kind_of_decoder(name):
    model = (
        lens(name.removeprefix("lens "))
        if name.startswith("lens ")
        else made(name, **HARD.get(name, {}))
    )
    before = hooks_of(model)
    found = find_circuit(model, IDS, CORRUPTED, PAIR, "eap", positions=True, replicates=7)
    expected = oracle(model, IDS, CORRUPTED)
    close(found.positions, expected.mean(0))
    close(found.scores, expected.sum(1).mean(0))
    counts = torch.from_numpy(resampled_counts(len(IDS), 7) / len(IDS)).double()
    close(found.replicates, torch.einsum("qb,bpwr->qwr", counts, expected))
    nodes = find_circuit(model, IDS, CORRUPTED, PAIR, "atp", positions=True, replicates=7)
    close(nodes.positions, expected.mean(0).sum(-1))
    close(nodes.replicates, torch.einsum("qb,bpwr->qw", counts, expected))
    assert hooks_of(model) == before
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    if name in PLAIN:
        return
    # the norms of each reader run again under the rules, and so do factors of q, k and v
    with rules(model, "gim"):
        expected = oracle(model, IDS, CORRUPTED)
    gim = find_circuit(model, IDS, CORRUPTED, PAIR, "gim", replicates=0)
    close(gim.scores, expected.sum(1).mean(0))
    assert gim.rules is not None and not gim.replicates.numel()


@pytest.mark.parametrize("name", ["llama", "gpt2", "lens llama"])
def test_integrated_gradients_are_means_of_those_on_the_way(name):
    model = lens(name.removeprefix("lens ")) if name.startswith("lens ") else made(name)
    wiring = wire(find_decoder(model, "test", ""))
    _, clean, _ = _run(model, wiring, IDS)
    _, other, _ = _run(model, wiring, CORRUPTED)
    start, end = other[:, :, 0], clean[:, :, 0]
    zeros = torch.zeros(*IDS.shape, len(wiring.graph.readers), wiring.graph.d, dtype=torch.float64)
    zeros.requires_grad_()
    total = torch.zeros_like(zeros)
    steps = 10
    for k in range(steps):

        def enter(module, args, kwargs, k=k):
            x = start + k / steps * (end - start)
            return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x})

        block = wiring.layers[0].block.module
        hook = block.register_forward_pre_hook(enter, with_kwargs=True)
        total += _run(model, wiring, IDS, zeros)[2]
        hook.remove()
    expected = torch.einsum("bpwd,bprd->wr", clean - other, total / steps) / len(IDS)
    expected = expected * wiring.graph.allowed()
    # of more passes than are kept before they meet the writers
    found = find_circuit(model, IDS, CORRUPTED, PAIR, "eap-ig", steps=steps)
    close(found.scores, expected)
    nodes = find_circuit(model, IDS, CORRUPTED, PAIR, "eap-ig", level="node", steps=steps)
    close(nodes.scores, expected.sum(1))


def test_activations_on_the_way_agree_between_levels():
    model = made("llama")
    options = {"steps": 2, "replicates": 3}
    edges = find_circuit(model, IDS, CORRUPTED, PAIR, "eap-ig-activations", **options)
    nodes = find_circuit(model, IDS, CORRUPTED, PAIR, "eap-ig-activations", level="node", **options)
    close(edges.scores.sum(1), nodes.scores.double())
    close(edges.replicates.sum(2), nodes.replicates.double())
    # with one step each part is as it was, and no gradient passes it
    one = find_circuit(model, IDS, CORRUPTED, PAIR, "eap-ig-activations", steps=1)
    plain = find_circuit(model, IDS, CORRUPTED, PAIR, "eap")
    assert not torch.allclose(one.scores, plain.scores)
    # by hand, of the input and each attention and MLP, whole writers of the graph
    wiring = wire(find_decoder(model, "test", ""))
    _, clean, _ = _run(model, wiring, IDS)
    _, other, _ = _run(model, wiring, CORRUPTED)
    zeros = torch.zeros(*IDS.shape, len(wiring.graph.readers), wiring.graph.d, dtype=torch.float64)
    zeros.requires_grad_()
    total = torch.zeros_like(zeros)
    places = [(model.model.embed_tokens, slice(0, 1))]
    for i, block in enumerate(model.model.layers):
        places.append((block.self_attn, slice(1 + 5 * i, 5 + 5 * i)))
        places.append((block.mlp, slice(5 + 5 * i, 6 + 5 * i)))
    for module, at in places:
        for k in (0.5, 1.0):
            x = torch.lerp(other[:, :, at].sum(2), clean[:, :, at].sum(2), k)
            hook = module.register_forward_hook(
                lambda m, a, out, x=x: (x, *out[1:]) if isinstance(out, tuple) else x
            )
            total += _run(model, wiring, IDS, zeros)[2]
            hook.remove()
    total /= 2 * len(places) * len(IDS)
    expected = torch.einsum("bpwd,bprd->wr", clean - other, total) * wiring.graph.allowed()
    close(edges.scores, expected)
    at = plain.graph.readers.index("logits")
    close(one.scores[:, at], plain.scores[:, at].double())


@pytest.mark.parametrize("layout", ["left", "right", "mixed"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_padding_and_batches_change_nothing(name, layout):
    model = made(name)
    clean, other = padded(layout), padded(layout)
    other["input_ids"] = torch.where(other["input_ids"] == 9, 22, other["input_ids"])
    other["input_ids"] = torch.where(other["input_ids"] == 2, 23, other["input_ids"])
    options = {"method": "eap", "replicates": 4, "positions": True}
    found = find_circuit(model, clean, other, PAIR, **options)
    padding = (clean["attention_mask"] == 0).all(0)
    assert not found.positions[padding].any()
    rows = []
    for b, kept in enumerate(clean["attention_mask"] == 1):
        row = (x["input_ids"][b, kept] for x in (clean, other))
        rows.append(find_circuit(model, *row, PAIR, "eap").scores)
    close(found.scores, torch.stack(rows).double().mean(0))
    some = find_circuit(model, clean, other, PAIR, batch=2, **options)
    close(some.scores, found.scores.double())
    close(some.replicates, found.replicates.double())
    close(some.positions, found.positions.double())


@pytest.mark.parametrize("level", ["edge", "node"])
def test_padding_that_a_metric_reads_is_not_counted(level):
    clean, other = padded("right"), padded("right")
    other["input_ids"] = torch.where(other["input_ids"] == 9, 22, other["input_ids"])
    other["input_ids"] = torch.where(other["input_ids"] == 2, 23, other["input_ids"])
    found = []
    for padding in (41, 42):
        # what the counterfactual's padding holds is nothing to anybody
        other["input_ids"] = torch.where(clean["attention_mask"] == 1, other["input_ids"], padding)
        one = find_circuit(
            made("llama"), clean, other, lambda logits: logits[:, :, 7].sum(1), "eap", level=level
        )
        found.append(one.scores)
    assert torch.equal(*found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrower_dtypes(dtype):
    model = made("llama")
    exact = find_circuit(model, IDS, CORRUPTED, PAIR, "eap").scores
    found = find_circuit(made("llama").to(dtype), IDS, CORRUPTED, PAIR, "eap")
    assert found.scores.dtype == torch.float32
    away = (found.scores - exact).norm() / exact.norm()
    assert away < 400 * torch.finfo(dtype).eps


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_callers_without_gradients(context):
    model = made("llama")
    for method in ("eap", "eap-ig", "eap-ig-activations"):
        expected = find_circuit(model, IDS, CORRUPTED, PAIR, method, steps=1)
        with context():
            found = find_circuit(model, IDS, CORRUPTED, PAIR, method, steps=1)
        assert torch.equal(found.scores, expected.scores)
    with context():
        probe = gim_probe(model, IDS, PAIR, counterfactual=CORRUPTED, rules=None)
    expected = gim_probe(model, IDS, PAIR, counterfactual=CORRUPTED, rules=None)
    assert torch.equal(probe.scores, expected.scores)


def test_tiles_of_tokens(monkeypatch):
    model = made("gemma2")
    whole = find_circuit(model, IDS, CORRUPTED, PAIR, "eap", replicates=3, positions=True)
    # three tokens of one prompt at a time, and readers of a block at a time
    monkeypatch.setattr("mikernels.circuits.scoring.READERS", 1)
    token = 8 * 24 * (len(whole.graph.writers) + 2 * 9)
    monkeypatch.setattr("mikernels.circuits.scoring.TILE", 3 * token)
    tiled = find_circuit(model, IDS, CORRUPTED, PAIR, "eap", replicates=3, positions=True)
    for name in ("scores", "replicates", "positions"):
        close(getattr(tiled, name), getattr(whole, name).double())


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "lens llama"])
def test_keys_and_values_have_their_names(name):
    lensed = name.startswith("lens ")
    model = lens(name.removeprefix("lens ")) if lensed else made(name)
    attention = parts(model, 1)[0] if not lensed else model.blocks[1].attn
    size = 24 // 4
    keys = {
        "llama": lambda: [attention.k_proj.weight],
        "gpt2": lambda: [attention.c_attn.weight[:, 24:48], attention.c_attn.bias[24:48]],
        "gpt_neox": lambda: [
            x.unflatten(0, (4, 3, size))[:, 1]
            for x in (attention.query_key_value.weight, attention.query_key_value.bias)
        ],
        "lens llama": lambda: [getattr(attention, "_W_K", getattr(attention, "W_K", None))],
    }
    with torch.no_grad():
        for x in keys[name]():
            x.mul_(1e-6)
    found = find_circuit(model, IDS, CORRUPTED, PAIR, "eap")
    # little passes the keys' weights
    largest = found.scores.abs().amax(0)
    for reader, one in zip(found.graph.readers, (largest / largest.max()).tolist(), strict=True):
        if reader.startswith("L1.") and reader.endswith((".k", ".v")):
            assert (one > 1e-3) == reader.endswith(".v") and not 1e-5 < one < 1e-3, reader


def test_without_a_metric_it_is_the_token_predicted_on_the_prompt():
    model = made("llama")
    said = model(IDS).logits[:, -1].argmax(-1)
    found = find_circuit(model, IDS, CORRUPTED, method="eap")
    close(found.scores, find_circuit(model, IDS, CORRUPTED, said, "eap").scores.double())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_gradients_that_do_not_add_up_are_refused(dtype):
    model = made("llama", dtype)

    def double(module, args, output):
        if output.requires_grad:
            output.register_hook(lambda g: 2 * g)

    model.model.layers[1].input_layernorm.register_forward_hook(double)
    with pytest.raises(ValueError, match=r"gradients of the readers of block 1 must add up"):
        find_circuit(model, IDS, CORRUPTED, PAIR, "eap")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_what_is_written_and_does_not_add_up_is_refused(dtype):
    model = made("llama", dtype)

    def steer(module, args, output):
        # without a gradient, and not of the 8 tokens by which the model is known
        return output + output.detach() / 2 if output.shape[1] == 5 else None

    model.model.layers[1].register_forward_hook(steer)
    with pytest.raises(ValueError, match=r"what its parts write must add up to what is read"):
        find_circuit(model, IDS, CORRUPTED, PAIR, "eap")


def test_products_and_columns_that_are_not_the_layout_are_refused(monkeypatch):
    model = made("llama")
    hook = model.model.layers[1].self_attn.q_proj.register_forward_hook(lambda m, a, y: 1.01 * y)
    with pytest.raises(ValueError, match=r"q of block 1 must be what attention reads times W \+ b"):
        find_circuit(model, IDS, CORRUPTED, PAIR, "eap")
    hook.remove()
    decoder = type(find_decoder(model, "test", ""))
    projections = decoder.projections

    def turned(self, block):
        q, *others = projections(self, block)
        n, _, size = q.weight.shape
        columns = torch.arange(n * size).view(n, size).flip(0)
        return q._replace(weight=q.weight.flip(0), columns=columns), *others

    monkeypatch.setattr(decoder, "projections", turned)
    with pytest.raises(ValueError, match=r"q of head 0 in block 0 is not made of the columns"):
        find_circuit(model, IDS, CORRUPTED, PAIR, "eap")


def test_massive_activations_that_a_later_block_takes_away():
    model = made("gpt2", torch.float32)
    exact = made("gpt2")
    with torch.no_grad():
        for one in (model, exact):
            one.transformer.h[0].mlp.c_proj.bias[0] += 1e5
            one.transformer.h[2].mlp.c_proj.bias[0] -= 1e5
    found = find_circuit(model, IDS, CORRUPTED, PAIR, "eap").scores
    expected = find_circuit(exact, IDS, CORRUPTED, PAIR, "eap").scores
    assert (found - expected).norm() < 1e-2 * expected.norm()


def test_whether_norms_are_frozen_is_told_by_tokens_with_gradients():
    # one token of two prompts, the first, would be looked at: padding in all of these
    ids = IDS.repeat(64, 1)
    other, mask = CORRUPTED.repeat(64, 1), torch.ones_like(ids)
    mask[::2, 0] = 0
    given = [{"input_ids": x, "attention_mask": mask} for x in (ids, other)]
    options = {"metric": PAIR, "method": "gim", "replicates": 0}
    model = made("llama")
    edges = find_circuit(model, *given, **options)
    nodes = find_circuit(model, *given, level="node", **options)
    close(edges.scores.sum(1), nodes.scores.double())


def test_many_passes_in_bf16():
    options = {"metric": PAIR, "method": "eap-ig", "replicates": 0, "level": "node"}
    exact = find_circuit(made("llama"), IDS, CORRUPTED, steps=60, **options).scores
    found = find_circuit(made("llama", torch.bfloat16), IDS, CORRUPTED, steps=300, **options).scores
    assert (found - exact).norm() < 0.1 * exact.norm()
    # of edges the same is in
    one = [Gradients([torch.ones(1, 1, 1, 1, dtype=torch.bfloat16)] * 3, None)] * 300
    total = reduce(_sum, one)
    assert [g.item() for g in total.heads] == [300, 300, 300]


@pytest.mark.parametrize("method", ["gim", "eap-ig", "eap-ig-activations"])
def test_within_inference_mode(method):
    model = made("llama")
    options = {"method": method, "steps": 2, "replicates": 2}
    expected = find_circuit(model, IDS, CORRUPTED, **options)
    with torch.inference_mode():
        found = find_circuit(model, IDS.clone(), CORRUPTED.clone(), **options)
    assert torch.equal(found.scores, expected.scores)
    assert not found.scores.is_inference() and not found.replicates.is_inference()


def test_a_callable_gets_all_prompts(monkeypatch):
    model, answers = made("llama"), torch.tensor([7, 9])
    monkeypatch.setattr("mikernels.circuits.find.BATCH", 1)
    found = find_circuit(
        model, IDS, CORRUPTED, lambda logits: logits[range(len(logits)), -1, answers], "eap"
    )
    expected = find_circuit(model, IDS, CORRUPTED, answers, "eap")
    close(found.scores, expected.scores.double())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"method": "epa"}, ValueError, r"method must be one of .*'eap-ig-activations'.*got 'epa'"),
        ({"method": "atp", "level": "edge"}, ValueError, r"'node' for 'atp', got 'edge'"),
        ({"level": "head"}, ValueError, r"level must be one of \('edge', 'node'\).*'head'"),
        ({"steps": 0}, ValueError, "steps must be at least 1, got 0"),
        ({"replicates": -1}, ValueError, "replicates must be at least 0, got -1"),
        ({"batch": 0}, ValueError, "batch must be at least 1 prompt, got 0"),
        ({"method": "gim", "rules": "relp"}, ValueError, "rules must be None for method 'gim'"),
        ({"corrupted": CORRUPTED[:, 1:]}, ValueError, r"corrupted must have the tokens of clean"),
        ({"corrupted": CORRUPTED[:1]}, ValueError, r"corrupted must have the tokens of clean"),
        (
            {name: dict(input_ids=IDS, attention_mask=mask) for name, mask in SIDES.items()},
            ValueError,
            "have its padding where clean has it, got the first token of row 1 at 0 and 1",
        ),
        ({"corrupted": IDS}, ValueError, "corrupted must differ from clean, .* row 0"),
        ({"metric": 50}, ValueError, "50"),
        ({"clean": ["a text"]}, TypeError, "clean must be token ids without a tokenizer"),
    ],
)
def test_bad_input_before_the_model_runs(change, error, message):
    model = made("llama")

    def ran(*call):
        raise AssertionError("the model ran")

    model.register_forward_pre_hook(ran)
    given = {"clean": IDS, "corrupted": CORRUPTED, "metric": PAIR, "method": "eap", **change}
    with pytest.raises(error, match=message):
        find_circuit(model, **given)


def test_nothing_to_explain_and_models_of_another_arithmetic():
    model = made("llama")
    with pytest.raises(ValueError, match="metric must differ.*nothing to explain"):
        find_circuit(model, IDS, CORRUPTED, lambda logits: logits[:, 0, 7])
    with pytest.raises(ValueError, match="must return input"):
        find_circuit(tiny("granite", residual_multiplier=0.5), IDS, CORRUPTED, PAIR)
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(ValueError, match=r"got torch.autocast \(bfloat16\)"),
    ):
        find_circuit(model, IDS, CORRUPTED, PAIR)
    assert not hooks_of(model)
