# SPDX-License-Identifier: Apache-2.0
"""Backward rules in HookedTransformers, against an fp64 oracle; the library's own hooks."""

import threading

import oracle as measure
import pytest
import torch
from decoder_cases import IDS, hooks_of, padded, tiny
from doubles import Doubles
from lens_cases import KINDS, lens
from lens_oracle import lens_oracle
from rules_cases import ALL, batches, score

from mikernels.models.rules import PRESETS, Rules, rules

pytestmark = [
    pytest.mark.peers,
    pytest.mark.filterwarnings("ignore:HookedTransformer is deprecated"),
]


def rules_of(kind):
    """Those that have a place in it, of ALL."""
    options = {"gated_mlp": False, "num_experts": None, "normalization_type": "LN", **KINDS[kind]}
    left_out = set()
    if not (options["gated_mlp"] or options["num_experts"]):
        left_out |= {"gate", "up"}
    if options.get("attn_only") or kind == "solu":
        left_out |= {"activation", "gate", "up"}
    if options["normalization_type"] is None:
        left_out.add("norm")
    return {rule: said for rule, said in ALL._asdict().items() if rule not in left_out}


def theirs(model, batch, hooks=()):
    """Logits of the library's model, its gradients at the embeddings and before each block."""
    reads, kept = {}, batch["attention_mask"] == 1

    def embed(x, hook):
        reads[hook.name] = x.detach().requires_grad_()
        return reads[hook.name]

    def keep(x, hook):
        reads[hook.name] = x

    own = [("hook_embed", embed), (lambda name: name.endswith("hook_resid_pre"), keep)]
    with Doubles(), model.hooks(fwd_hooks=[*own, *hooks]):
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"])
        found = torch.autograd.grad(score(logits, kept), list(reads.values()))
    return logits.detach()[kept], found


def of_oracle(model, batch, said):
    logits, x0, stream = lens_oracle(model, batch, said)
    kept = batch["attention_mask"] == 1
    return logits[kept].detach(), torch.autograd.grad(score(logits, kept), [x0, *stream])


def assert_truth(found, expected):
    for one, truth in zip(found, expected, strict=True):
        assert (one - truth).abs().max() <= 1e-11 * truth.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_oracle(kind):
    model, there = lens(kind), rules_of(kind)
    alone = [{"softmax": "frozen"}, *({rule: said} for rule, said in there.items())]
    for batch, sets in zip(batches(), ([there], [there, *alone]), strict=True):
        logits, plain = theirs(model, batch)
        true_logits, true_plain = of_oracle(model, batch, Rules())
        torch.testing.assert_close(logits, true_logits)
        assert_truth(plain, true_plain)
        for said in sets:
            with rules(model, **said) as report:
                changed, found = theirs(model, batch)
            assert torch.equal(changed, logits)
            assert_truth(found, of_oracle(model, batch, Rules(**said))[1])
            assert not torch.equal(found[0], plain[0]), said
            for effect in report.effects:
                assert effect.acted == effect.places > 0
                if (effect.rule, effect.value) == ("softmax", "frozen"):
                    assert effect.change is None
                else:
                    assert effect.change > 1e-3, effect
    assert hooks_of(model) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["gpt2, folded", "llama", "mixtral"])
def test_low_precisions_stay_and_are_as_near_as_the_model_itself(kind, dtype):
    model, batch = lens(kind, dtype), padded("left")
    exact = lens(kind)
    exact.load_state_dict(model.state_dict())

    def run(one):
        reads = []

        def embed(x, hook):
            reads.append(x.detach().requires_grad_())
            return reads[0]

        with one.hooks(fwd_hooks=[("hook_embed", embed)]):
            logits = one(batch["input_ids"], attention_mask=batch["attention_mask"])
            kept = batch["attention_mask"] == 1
            return logits.detach(), torch.autograd.grad(score(logits.double(), kept), reads)[0]

    logits, plain = run(model)
    with rules(model, "gim"):
        changed, found = run(model)
    assert measure.identical(changed, logits) and found.dtype == dtype
    truth = of_oracle(exact, batch, PRESETS["gim"])[1][0]
    # as far as the model without rules is from its own truth
    own = plain.double() - of_oracle(exact, batch, Rules())[1][0]
    measure.assert_accurate(found, truth, truth + own)


def test_the_librarys_hooks_work_and_see_the_rules():
    model, batch = lens("llama, split"), {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    names = (
        *("hook_pattern", "hook_attn_scores", "hook_q", "hook_rot_k", "hook_v", "hook_z"),
        *("hook_pre", "hook_pre_linear", "hook_post", "hook_normalized", "hook_result"),
    )

    def seen(**said):
        found = {}

        def keep(grad, hook):
            found[hook.name] = grad.clone()

        wanted = [name for name in model.hook_dict if name.rsplit(".", 1)[-1] in names]
        with model.hooks(bwd_hooks=[(name, keep) for name in wanted]):
            if said:
                with rules(model, **said):
                    _, grads = theirs(model, batch)
            else:
                _, grads = theirs(model, batch)
        assert found.keys() == set(wanted)
        return found, grads

    plain, _ = seen()
    found, grads = seen(query=0.5)
    with rules(model, query=0.5):
        assert_truth(grads, theirs(model, batch)[1])
    at = "blocks.1.attn.hook_q"
    torch.testing.assert_close(found[at], 0.5 * plain[at])
    for same in ("blocks.1.attn.hook_rot_k", "blocks.1.attn.hook_v", "blocks.1.mlp.hook_post"):
        torch.testing.assert_close(found[same], plain[same])

    # edits: of scores before the softmax, of the pattern after it, of norms and products
    def knock_out(scores, hook):
        scores = scores.clone()
        scores[:, 1, :, 0] = -torch.inf if hook.layer() else -3.0
        return scores

    def ablate(pattern, hook):
        return pattern * torch.tensor([1.0, 0.5, 0.0, 1.0])[:, None, None]

    def double(x, hook):
        return 2 * x

    edits = [
        ("blocks.1.attn.hook_attn_scores", knock_out),
        ("blocks.0.attn.hook_attn_scores", knock_out),
        ("blocks.0.attn.hook_pattern", ablate),
        ("blocks.0.mlp.hook_pre", double),
        ("blocks.1.mlp.hook_post", double),
        ("blocks.1.ln1.hook_scale", double),
        ("blocks.1.ln2.hook_normalized", double),
    ]
    everything = ALL._asdict()
    logits, _ = theirs(model, batch, edits)
    for before in (True, False):
        with model.hooks(fwd_hooks=edits if before else []), rules(model, **everything):
            changed, one = theirs(model, batch, [] if before else edits)
        assert torch.equal(changed, logits)
        if before:
            found = one
    assert_truth(one, found)
    # written with the edits in the weights: a doubled scale, halved rows of W_O
    other = lens("llama, split")
    with torch.no_grad():
        other.blocks[0].mlp.W_gate *= 2
        other.blocks[1].mlp.W_out *= 2
        other.blocks[1].ln1.w /= 2
        other.blocks[1].ln2.w *= 2
        other.blocks[0].attn.W_O *= torch.tensor([1.0, 0.5, 0.0, 1.0])[:, None, None]
    with rules(other, **everything), Doubles():
        changed, found = theirs(other, batch, edits[:2])
    torch.testing.assert_close(changed, logits)
    # the scale that is doubled is in both a constant
    assert_truth(one, found)


def test_rules_hold_where_they_are_said_and_nothing_is_left():
    model, batch = lens("qwen3"), padded("left")
    logits, plain = theirs(model, batch)
    with rules(model, "gim", layers=[1]) as report:
        _, found = theirs(model, batch)
    assert report["norm"].places == 4 and report["softmax"].acted == 1
    with rules(model, "gim") as report:
        _, whole = theirs(model, batch)
        with rules(model, softmax=5.0, gate=0.2):
            _, inner = theirs(model, batch)
        with rules(model, "plain"):
            assert_truth(theirs(model, batch)[1], plain)
    assert report["norm"].acted == report["norm"].places == 9
    assert not torch.equal(found[0], whole[0])
    # the gradient that enters block 1 has passed its rules only
    partly = Rules(**PRESETS["gim"].said() | {"softmax": 5.0, "gate": 0.2})
    assert_truth(inner, of_oracle(model, batch, partly)[1])
    # of nested blocks, either way round, what is read at a point is what the other left there
    for outer, within in (
        ({"gate": 0.5}, {"activation": "secant"}),
        ({"activation": "secant"}, {"gate": 0.5}),
    ):
        with rules(model, **outer), rules(model, **within):
            _, both = theirs(model, batch)
        assert_truth(both, of_oracle(model, batch, Rules(**outer, **within))[1])
    with pytest.raises(KeyError, match="mine"), rules(model, "gim"):
        stop = [("blocks.1.attn.hook_attn_scores", lambda x, hook: {}["mine"])]
        theirs(model, batch, stop)
    model.reset_hooks()
    assert hooks_of(model) == 0 and torch.equal(theirs(model, batch)[1][0], plain[0])


def test_rules_are_of_their_thread():
    model, batch = lens("llama"), padded("left")
    plain, found = theirs(model, batch), {}

    def run(said, times):
        # what a user's hooks see is every thread's: parameters instead
        for _ in range(times):
            with rules(model, **said):
                logits = model(batch["input_ids"], attention_mask=batch["attention_mask"])
                kept = batch["attention_mask"] == 1
                found.setdefault(str(said), []).append(
                    torch.autograd.grad(score(logits, kept), model.embed.W_E)[0]
                )

    ways = ({"softmax": 3.0}, {"norm": "frozen", "gate": 0.25}, {"activation": "secant"})
    for said in ways:
        run(said, 1)
    threads = [threading.Thread(target=run, args=(said, 8)) for said in ways]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for said in ways:
        first, *others = found[str(said)]
        assert len(others) == 8 and all(torch.equal(one, first) for one in others)
    assert hooks_of(model) == 0 and torch.equal(theirs(model, batch)[0], plain[0])


def test_what_is_refused():
    model = lens("attn only")
    for said, message in (
        ({"gate": 0.5}, "gate must have a place in the model, got HookedTransformer without any"),
        ({"activation": "secant"}, "activation must have a place in the model"),
        ({"preset": "gim", "layers": [2]}, r"layers must be some of 0..1 .* got \[2\]"),
    ):
        with pytest.raises(ValueError, match=f"rules: {message}"), rules(model, **said):
            raise AssertionError
    with rules(model, "attnlrp") as report:
        theirs(model, padded("left"))
    assert report["activation"].places == 0 and report["norm"].acted == 3
    bridged = tiny("llama")
    bridged.model.layers[1].self_attn.hook_pattern = lens("gpt2").blocks[0].attn.hook_pattern
    with pytest.raises(ValueError, match="it is inside of a TransformerBridge.*make it with tran"):
        rules(bridged, "gim").__enter__()
    model = lens("solu")
    message = "activation must act on .* got blocks.0.mlp, whose f of half a row is"
    with pytest.raises(ValueError, match=message), rules(model, activation="secant"):
        theirs(model, padded("left"))


def broken(kind, part, changed):
    model = lens(kind)
    module = model.get_submodule(part)
    kind = type(module)
    module.__class__ = type("Changed", (kind,), {"forward": changed(kind.forward)})
    return model


def test_places_that_compute_something_else_are_refused():
    batch = padded("left")

    def tripled(forward):
        # hook_scale is not what divides
        def changed(self, x):
            scale = self.hook_scale((x.pow(2).mean(-1, keepdim=True) + self.eps).sqrt())
            return self.hook_normalized(x / scale / 3) * self.w

        return changed

    def cubed(forward):
        def changed(self, x):
            pre, up = self.hook_pre(x @ self.W_gate), self.hook_pre_linear(x @ self.W_in)
            return self.hook_post(self.act_fn(pre) * up**3) @ self.W_out

        return changed

    for model, message in (
        (broken("llama", "blocks.1.ln2", tripled), "norm must be .* got blocks.1.ln2, whose hook_"),
        (broken("llama", "blocks.1.mlp", cubed), r"got blocks.1.mlp, whose hook_post is given"),
        (lens("llama", use_attention_sinks=True), "softmax must act on .* got blocks.0.attn, wher"),
    ):
        if message.startswith("softmax"):
            with torch.no_grad():
                model.blocks[0].attn.sinks.fill_(1.0)
        with pytest.raises(ValueError, match=f"rules: .*{message}"), rules(model, "gim"):
            theirs(model, batch)
        model.reset_hooks()
        assert hooks_of(model) == 0


def test_gain_and_bias_may_be_in_what_is_normed():
    """As in TransformerLens 2."""

    def earlier(forward):
        def changed(self, x):
            x = x - x.mean(-1, keepdim=True)
            scale = self.hook_scale((x.pow(2).mean(-1, keepdim=True) + self.eps).sqrt())
            return self.hook_normalized(x / scale * self.w + self.b)

        return changed

    found, batch = [], padded("left")
    for model in (lens("gpt2"), broken("gpt2", "blocks.1.ln1", earlier)):
        with rules(model, norm="frozen", layers=[1]) as report:
            found.append((theirs(model, batch)[1], report["norm"].change))
    assert_truth(found[1][0], found[0][0])
    assert found[1][1] == pytest.approx(found[0][1], rel=1e-9)


def test_a_rule_that_does_not_act_on_what_ran_raises():
    def aside(forward):
        def changed(self, query_input, key_input, value_input, **options):
            v = self.hook_v(torch.einsum("bpd,hde->bphe", value_input, self.W_V))
            return torch.einsum("bphe,hed->bpd", self.hook_z(v), self.W_O) + self.b_O

        return changed

    model = broken("gpt2", "blocks.1.attn", aside)
    message = "softmax must act on blocks.1.attn, which ran without"
    with pytest.raises(RuntimeError, match=message), rules(model, softmax=2.0):
        theirs(model, padded("left"))
    with rules(model, value=0.5):
        theirs(model, padded("left"))
