# SPDX-License-Identifier: Apache-2.0
"""Backward rules of every kind of decoder against an fp64 oracle; what a `with` block keeps."""

import asyncio
import threading
import warnings

import oracle as measure
import pytest
import torch
import torch.nn.functional as F
from decoder_cases import HARD, IDS, hooks_of, made, padded, tiny
from doubles import Doubles
from largest import Largest
from rules_cases import ALL, PLAIN_MLP, batches, score, theirs
from rules_oracle import oracle

from mikernels.circuits import gradient_components
from mikernels.models.rules import PRESETS, Rules, rules

SAID = {
    "norm": "frozen",
    "softmax": 3.0,
    "query": 0.3,
    "key": 0.7,
    "value": 0.6,
    "activation": "secant",
    "gate": 0.4,
    "up": 0.9,
}
IMPLEMENTATIONS = ("eager", "sdpa")


def cases():
    # for Gemma 2 transformers has no sdpa, which has no soft-cap
    return [(n, i) for n in HARD for i in IMPLEMENTATIONS if (n, i) != ("gemma2", "sdpa")]


def sets_of_rules(name):
    """Each alone, the patterns frozen, and all at once."""
    for rule, said in SAID.items():
        if rule not in ("gate", "up") or name not in PLAIN_MLP:
            yield Rules(**{rule: said})
    yield Rules(softmax="frozen")
    both = {} if name in PLAIN_MLP else {"gate": ALL.gate, "up": ALL.up}
    yield Rules(**{rule: getattr(ALL, rule) for rule in SAID if rule not in ("gate", "up")}, **both)


def of_oracle(model, batch, said, dtype=torch.float64):
    found = oracle(model, batch, said, dtype)
    kept = batch["attention_mask"] == 1
    # what the blocks read; the final norm's input is not a leaf of theirs
    return torch.autograd.grad(score(found.logits, kept), [found.x0, *found.stream[:-1]])


@pytest.mark.parametrize(("name", "attention"), cases(), ids=lambda x: x)
def test_gradients_are_those_of_the_oracle(name, attention):
    model = made(name, attn_implementation=attention, **HARD[name])
    for batch in batches():
        logits, plain = theirs(model, batch)
        for said in sets_of_rules(name):
            expected = of_oracle(model, batch, said)
            for way in ("fused", "two-pass") if isinstance(said.softmax, float) else (None,):
                with rules(model, said, attention=way) as report:
                    changed, found = theirs(model, batch)
                assert torch.equal(changed, logits)
                for one, truth in zip(found, expected, strict=True):
                    scale = truth.abs().max()
                    assert (one - truth).abs().max() <= 1e-11 * scale, (said, way)
                # of a ReLU the secant is the derivative
                same = name == "opt" and said == Rules(activation="secant")
                assert torch.equal(found[0], plain[0]) == same
                for effect in report.effects:
                    assert effect.acted == effect.places > 0
                    if effect.value == "frozen" and effect.rule == "softmax":
                        assert effect.change is None
                    elif name != "opt" or effect.rule != "activation":
                        assert effect.change > 1e-3, effect


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "attention"), cases(), ids=lambda x: x)
def test_low_precisions_are_as_near_as_eager_torch(name, attention, dtype):
    model = made(name, dtype, attn_implementation=attention, **HARD[name])
    batch = padded("left")
    said = PRESETS["gim"]
    exact = made(name, attn_implementation=attention, **HARD[name])
    exact.load_state_dict(model.state_dict())
    truth, eager = of_oracle(exact, batch, said), of_oracle(exact, batch, said, dtype)
    logits, plain = theirs(model, batch, ())
    # a ReLU that flips, or a kernel that rounds otherwise: the model without rules has that too
    own = [a - b for a, b in zip(plain, of_oracle(exact, batch, Rules()), strict=True)]
    for way in ("fused", "two-pass"):
        with rules(model, said, attention=way):
            changed, found = theirs(model, batch, ())
        assert measure.identical(changed, logits)
        for one, true, *others in zip(found, truth, eager, own, strict=True):
            assert one.dtype == dtype
            rough = max(others[0] - true, others[1], key=lambda error: error.abs().max())
            measure.assert_accurate(one, true, true + rough)


def backward(model, ids=IDS):
    x = model.get_input_embeddings()(ids).detach().requires_grad_()
    model(inputs_embeds=x, use_cache=False).logits[:, -1, 7].sum().backward()
    return x.grad


def of(model, *args, **options):
    with rules(model, *args, **options):
        return backward(model)


def test_gradients_of_parameters_follow_the_rules_too():
    model = made("gpt2", attn_implementation="eager", **HARD["gpt2"])
    found = {}
    for said in ("gim", "plain"):
        model.zero_grad()
        with Doubles():
            of(model, said)
        found[said] = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    with Doubles():
        backward(model)
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(found["plain"][name], p.grad, rtol=1e-11, atol=1e-13)
    # of a frozen norm: the gain has the gradient at the output times the normed input, as ever
    for part in ("weight", "bias"):
        name = f"transformer.ln_f.{part}"
        torch.testing.assert_close(found["gim"][name], found["plain"][name])
        assert found["gim"][name].abs().max() > 1e-3
        name = f"transformer.h.1.ln_1.{part}"
        assert not torch.allclose(found["gim"][name], found["plain"][name])


def test_rules_hold_where_they_are_said():
    model = made("qwen3", **HARD["qwen3"])
    batch = padded("left")
    with rules(model, "gim", layers=[1]) as report:
        _, found = theirs(model, batch)
    assert report["norm"].places == 4 and report["softmax"].acted == 1
    kept = batch["attention_mask"] == 1
    there = oracle(model, batch, for_layers={1: PRESETS["gim"]})
    expected = torch.autograd.grad(score(there.logits, kept), there.x0)[0]
    assert (found[0] - expected).abs().max() <= 1e-11 * expected.abs().max()


def test_of_nested_blocks_the_innermost_decides():
    model = tiny("llama")
    outer, inner, plain = of(model, "gim"), of(model, softmax=3.0, gate=0.2), backward(model)
    both = {**PRESETS["gim"].said(), "softmax": 3.0, "gate": 0.2}
    with rules(model, "gim") as first:
        with rules(model, softmax=3.0, gate=0.2) as second:
            found = backward(model)
        again = backward(model)
        with rules(model, "plain"):
            assert torch.equal(backward(model), plain)
    assert torch.equal(found, of(model, Rules(**both)))
    assert torch.equal(again, outer) and not torch.equal(found, inner)
    assert second["softmax"].acted == 3 and first["softmax"].acted == 3
    assert torch.equal(backward(model), plain)


def everything_of(model):
    return {
        name: (sorted(vars(m)), len(m._forward_hooks), len(m._forward_pre_hooks))
        for name, m in model.named_modules()
    }


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_the_model_is_as_it_was_whatever_ends_the_block(name):
    model = made(name)
    before, plain, config = everything_of(model), backward(model), model.config.to_dict()
    of(model, "gim")
    with pytest.raises(KeyError, match="mine"), rules(model, "gim"), rules(model, softmax=3.0):
        backward(model)
        raise KeyError("mine")
    assert everything_of(model) == before and model.config.to_dict() == config
    assert torch.equal(backward(model), plain)


def test_blocks_may_end_in_any_order():
    model = tiny("llama")
    before, plain, expected = everything_of(model), backward(model), of(model, softmax=3.0)
    first, second = rules(model, "gim"), rules(model, softmax=3.0)
    first.__enter__()
    second.__enter__()
    backward(model)
    first.__exit__(None, None, None)
    assert torch.equal(backward(model), expected)
    second.__exit__(None, None, None)
    assert everything_of(model) == before and torch.equal(backward(model), plain)


def test_rules_are_of_their_thread_and_task():
    model = tiny("llama")
    plain, ruled = backward(model), of(model, "gim")
    found, entered, done = {}, threading.Event(), threading.Event()

    def other():
        entered.wait()
        found["plain"] = backward(model)
        with rules(model, softmax=3.0):
            found["other"] = backward(model)
        done.set()

    thread = threading.Thread(target=other)
    thread.start()
    with rules(model, "gim"):
        entered.set()
        done.wait()
        found["ruled"] = backward(model)
    thread.join()
    assert torch.equal(found["plain"], plain) and torch.equal(found["ruled"], ruled)
    assert torch.equal(found["other"], of(model, softmax=3.0))

    async def task(preset):
        with rules(model, preset):
            await asyncio.sleep(0)
            return backward(model)

    async def tasks():
        return await asyncio.gather(task("gim"), task("plain"))

    for one, expected in zip(asyncio.run(tasks()), (ruled, plain), strict=True):
        assert torch.equal(one, expected)


def test_backward_may_run_after_the_block():
    model = tiny("llama")
    expected = of(model, "gim")
    x = model.get_input_embeddings()(IDS).detach().requires_grad_()
    with rules(model, "gim") as report:
        logits = model(inputs_embeds=x, use_cache=False).logits
    assert report["norm"].acted == 7 and report["norm"].change is None
    logits[:, -1, 7].sum().backward()
    assert torch.equal(x.grad, expected) and report["norm"].change > 0.01


def test_components_under_rules():
    model = tiny("llama")
    plain = gradient_components(model, IDS, 7)
    with rules(model, "gim"):
        found = gradient_components(model, IDS, 7)
    # nothing but a norm comes after the last MLP
    with rules(model, norm="frozen"):
        frozen = gradient_components(model, IDS, 7)
    assert torch.equal(found["L2.mlp"], frozen["L2.mlp"])
    assert all(not torch.equal(found[name], plain[name]) for name in plain)


def test_a_compiled_wrapper_of_the_model_follows_the_rules():
    model = tiny("llama")
    compiled = torch.compile(model, backend="eager")
    expected = of(model, "gim")
    x = model.get_input_embeddings()(IDS).detach().requires_grad_()
    first, second = rules(model, "gim"), rules(model, norm="frozen")
    first.__enter__()
    compiled(inputs_embeds=x, use_cache=False).logits[:, -1, 7].sum().backward()
    second.__enter__()
    backward(model)
    first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    assert torch.equal(x.grad, expected)
    # blocks that end in any order leave the process as it was
    assert torch._dynamo.eval_frame._stance.stance == "default"


def test_no_pattern_is_formed():
    tokens = 200
    model = tiny("llama", torch.float32)
    ids = torch.arange(tokens)[None] % 50
    for way in ("fused", "two-pass"):
        with Largest() as largest, rules(model, "gim", attention=way):
            backward(model, ids)
        assert tokens * 50 <= largest.numel < tokens * tokens


def test_what_is_refused():
    model = tiny("llama")
    for error, message, preset, options in (
        (ValueError, r"preset must be one of \['plain', 'gim', .* got 'GIM'", "GIM", {}),
        (TypeError, "preset must be a name .* or Rules, got int", 3, {}),
        (ValueError, "preset or a rule must be given, got neither", None, {}),
        (ValueError, "norm must be 'gradient' or 'frozen', got 'freeze'", None, {"norm": "freeze"}),
        (ValueError, "softmax must be .* or a temperature, got 'x'", None, {"softmax": "x"}),
        (ValueError, "softmax must be a temperature above 0, got -1", None, {"softmax": -1.0}),
        (ValueError, "gate must be a finite number, got nan", None, {"gate": float("nan")}),
        (ValueError, "key must be a finite number, got True", None, {"key": True}),
        (ValueError, "attention must be 'fused' or 'two-pass'", "gim", {"attention": "sdpa"}),
        (ValueError, r"layers must be some of 0..2 .* got \[7\]", "gim", {"layers": [1, 7]}),
    ):
        with pytest.raises(error, match=message), rules(model, preset, **options):
            raise AssertionError
    gpt2 = tiny("gpt2")
    with pytest.raises(ValueError, match="gate must have a place .* got GPT2LMHeadModel without"):
        of(gpt2, gate=0.5)
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got str"):
        of("llama", "gim")
    with pytest.raises(ValueError, match="rules: model must be a Hugging Face decoder"):
        of(torch.nn.Linear(2, 2), "gim")
    with pytest.raises(ValueError, match=r"rules: .* call model.eval\(\)"):
        of(tiny("llama").train(), "gim")
    compiled = tiny("llama")
    compiled.model.layers[1].mlp.compile(backend="eager")
    with pytest.raises(ValueError, match="rules: .* got compiled model.layers.1.mlp"):
        of(compiled, "gim")
    for broken in (model, gpt2, compiled):
        assert hooks_of(broken) == 0


def changed(kind, module, forward):
    model = tiny(kind)
    part = model.get_submodule(module)
    kind = type(part)
    part.__class__ = type("Changed", (kind,), {"forward": forward(kind.forward)})
    return model


def test_a_place_that_computes_something_else_is_refused():
    def twice(forward):
        return lambda self, x: 2 * forward(self, x)

    model = changed("llama", "model.layers.1.input_layernorm", twice)
    with pytest.raises(ValueError, match=r"norm must be gain .* model.layers.1.input_layernorm"):
        of(model, "gim")

    def added(forward):
        return lambda self, x: self.down_proj(self.act_fn(self.gate_proj(x)) + self.up_proj(x))

    model = changed("llama", "model.layers.1.mlp", added)
    with pytest.raises(ValueError, match=r"gate and up .* model.layers.1.mlp, whose down is given"):
        of(model, "gim")
    model = made("mixtral")
    model.model.layers[1].mlp.experts._apply_gate = None
    experts = type(model.model.layers[1].mlp.experts)
    whole = experts.forward

    def halved(self, *args, **kwargs):
        return 0.5 * whole(self, *args, **kwargs)

    model.model.layers[1].mlp.experts.__class__ = type("Experts", (experts,), {"forward": halved})
    with pytest.raises(ValueError, match=r"mlp.experts, whose first token is .* within"):
        of(model, "gim")


def test_attention_that_computes_something_else_is_refused():
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    def sharper(module, q, k, v, mask, scaling=None, **options):
        return sdpa_attention_forward(module, q, k, v, mask, scaling=1.01 * scaling, **options)

    AttentionInterface.register("sharper", sharper)
    model = tiny("llama")
    model.set_attn_implementation("sharper")
    message = r"softmax must act on .* model.layers.2.self_attn, whose output for query 1 of head 0"
    with pytest.raises(ValueError, match=message):
        of(model, softmax=2.0, attention="fused")
    # the function itself, twice, whatever it computes
    exact = tiny("llama")
    for block in exact.model.layers:
        block.self_attn.scaling *= 1.01
    found = of(model, softmax=2.0, attention="two-pass")
    torch.testing.assert_close(found, of(exact, softmax=2.0), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("layout", ["left", "right"])
def test_attention_that_leaves_out_padding(layout):
    """As flash attention's functions do: a mask of tokens, zeros at queries of padding."""
    from transformers import AttentionInterface, AttentionMaskInterface

    def unpadded(module, q, k, v, mask, scaling=None, **options):
        rows = []
        for row in range(len(q)):
            kept = mask[row].bool()
            parts = [t[row : row + 1, :, kept] for t in (q, k, v)]
            out = torch.nn.functional.scaled_dot_product_attention(
                *parts, scale=scaling, is_causal=True, enable_gqa=True
            )
            rows.append(torch.zeros_like(q[row]).index_copy(1, kept.nonzero()[:, 0], out[0]))
        return torch.stack(rows).transpose(1, 2), None

    AttentionInterface.register("unpadded", unpadded)
    AttentionMaskInterface.register("unpadded", lambda *args, attention_mask, **kw: attention_mask)
    batch = padded(layout)
    model = tiny("llama", attn_implementation="unpadded")
    expected = of_oracle(model, batch, Rules(softmax=3.0))
    for way in ("fused", "two-pass"):
        with rules(model, softmax=3.0, attention=way):
            found = theirs(model, batch)[1]
        for one, truth in zip(found, expected, strict=True):
            assert (one - truth).abs().max() <= 1e-11 * truth.abs().max()


def test_a_rule_that_does_not_act_on_what_ran_raises():
    model = tiny("llama")
    attention = model.model.layers[1].self_attn
    kind = type(attention)

    def own(self, hidden_states, *args, **kwargs):
        return self.o_proj(hidden_states.repeat(1, 1, 1)), None

    attention.__class__ = type("Own", (kind,), {"forward": own})
    message = "attention must call a function of transformers' ALL_ATTENTION_FUNCTIONS, got model"
    with pytest.raises(ValueError, match=message):
        of(model, "gim")
    bypass = made("gpt2", attn_implementation="eager", reorder_and_upcast_attn=True)
    bypass = bypass.float()
    with pytest.raises(RuntimeError, match="softmax must act on transformer.h.0.attn, which ran"):
        of(bypass, softmax=2.0)
    assert hooks_of(bypass) == 0


def test_a_rule_that_no_module_of_a_block_that_ran_is_called_for_raises():
    def by_hand(forward):
        def whole(self, x):
            gate, up = (F.linear(x, side.weight) for side in (self.gate_proj, self.up_proj))
            return F.linear(F.silu(gate) * up, self.down_proj.weight)

        return whole

    model = changed("llama", "model.layers.1.mlp", by_hand)
    for said in ({"gate": 0.5}, {"activation": "secant"}, {"preset": "gim"}):
        rule = "gate" if "preset" in said else min(said)
        place = r"(in block 1, which ran, got none|on model.layers.1.mlp.*, which ran without it)"
        with pytest.raises(RuntimeError, match=f"{rule} must act {place}"):
            of(model, **said)
    of(model, norm="frozen", softmax=2.0)
    of(model, "gim", layers=[0, 2])
    # what an inner block says is not for the outer one to do, nor what does not run
    whole = tiny("llama")
    with rules(whole, "gim"), rules(whole, softmax=3.0):
        backward(whole)
    x = torch.ones(1, 24, dtype=torch.float64, requires_grad=True)
    with rules(whole, "gim") as report:
        whole.model.norm(x).sum().backward()
    assert report["norm"].acted == 1 and report["softmax"].acted == 0


def test_a_block_in_which_nothing_ran_warns():
    model = tiny("llama")
    with pytest.warns(RuntimeWarning, match="no gradient was recorded"), rules(model, "gim"):
        pass
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeWarning), torch.no_grad(), rules(model, "gim"):
            model(IDS)


def test_the_report_is_a_table():
    model = tiny("llama")
    with rules(model, "gim") as report:
        backward(model)
    lines = str(report).splitlines()
    assert lines[0].split() == [
        "rule",
        "value",
        "acted",
        "on",
        "of",
        *["change", "of", "the", "gradient"],
    ]
    assert lines[-1].split() == ["up", "0.5", "3", "3", "50", "%"]
    assert [effect.rule for effect in report.effects] == [line.split()[0] for line in lines[1:]]
    assert len(report.__rich__().rows) == 7
