# SPDX-License-Identifier: Apache-2.0
"""The names of the package `gim`: its gradients where it acts, the rules' where it does not."""

import pytest
import torch
from decoder_cases import HARD, IDS, hooks_of, made
from doubles import Doubles
from lens_cases import lens
from rules_algebra import Rules
from rules_oracle import oracle

from mikernels.integrations import gim

peers = pytest.mark.peers
pytestmark = pytest.mark.filterwarnings("ignore:HookedTransformer is deprecated")

OFF = {
    "freeze_norm": False,
    "softmax_temperature": None,
    "q_scale": None,
    "k_scale": None,
    "v_scale": None,
}
# its options, and the same as rules
NORM = {**OFF, "freeze_norm": True}, Rules(norm="frozen")
SOFTMAX = {**OFF, "softmax_temperature": 3.0}, Rules(softmax=3.0)
QKV = {**OFF, "q_scale": 0.3, "k_scale": 0.7, "v_scale": 0.6}, Rules(query=0.3, key=0.7, value=0.6)
MLP = {**OFF, "mlp_scale": 0.4}, Rules(gate=0.4, up=0.4)


def package():
    return pytest.importorskip("gim", reason="gim-explain is not installed")


def gradient(model):
    """Of a logit, at the embeddings of a Hugging Face model."""
    x = model.get_input_embeddings()(IDS).detach().requires_grad_()
    score = model(inputs_embeds=x, use_cache=False).logits[:, -1, 7].sum()
    return torch.autograd.grad(score, x)[0]


# where the package acts: elsewhere it changes nothing, raises, or changes something else
ACTS = {
    ("gpt2", "sdpa"): (NORM, QKV),
    ("gpt2", "eager"): (NORM, SOFTMAX),
    ("llama", "sdpa"): (QKV,),
    ("llama", "eager"): (),
    ("gemma2", "eager"): (),
    ("qwen3", "sdpa"): (QKV,),
    ("gemma3_text", "sdpa"): (QKV,),
    ("phi3", "sdpa"): (QKV,),
    ("mixtral", "sdpa"): (QKV,),
    ("qwen3_moe", "sdpa"): (QKV,),
}


@peers
@pytest.mark.parametrize(("name", "attention"), ACTS, ids=lambda x: x)
def test_every_rule_acts_on_hugging_face_models_as_the_oracle_says(name, attention):
    theirs = package()
    model = made(name, attn_implementation=attention, **HARD[name])
    with Doubles():
        plain = gradient(model)
    for options, said in (NORM, SOFTMAX, QKV, *([] if name == "gpt2" else [MLP])):
        with gim.GIM(model, **options) as report, Doubles():
            found = gradient(model)
        truth = oracle(model, IDS, said)
        expected = torch.autograd.grad(truth.logits[:, -1, 7].sum(), truth.x0)[0]
        assert (found - expected).abs().max() <= 1e-11 * expected.abs().max()
        assert (found - plain).norm() > 1e-3 * plain.norm()
        assert all(effect.acted == effect.places > 0 for effect in report.effects)
        if (options, said) in ACTS[name, attention]:
            with theirs.GIM(model, **options), Doubles():
                torch.testing.assert_close(gradient(model), found, rtol=1e-9, atol=1e-12)
    assert hooks_of(model) == 0


@peers
@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma2", "pythia, split", "attn only"])
def test_gradients_in_hooked_transformers_are_the_packages(kind):
    theirs, model = package(), lens(kind)

    def run(context, **options):
        reads = []

        def embed(x, hook):
            reads.append(x.detach().requires_grad_())
            return reads[0]

        with context(model, **options), model.hooks(fwd_hooks=[("hook_embed", embed)]):
            score = model(IDS)[:, -1, 7].sum()
            return torch.autograd.grad(score, reads)[0]

    plain = run(gim.GIM, **OFF)
    for options in ({}, *(options for options, _ in (NORM, SOFTMAX, QKV))):
        found = run(gim.GIM, **options)
        torch.testing.assert_close(found, run(theirs.GIM, **options), rtol=1e-9, atol=1e-12)
        assert (found - plain).norm() > 1e-3 * plain.norm()
    for ids, options in (
        (IDS[0], {"target_token_id": 7}),
        (IDS[:1], {"target_position": 2, "softmax_temperature": 1.0}),
        (IDS[1], {"q_scale": None, "k_scale": 1.0, "freeze_norm": False}),
    ):
        found = gim.explain(model, ids, baseline_token_id=3, **options)
        expected = theirs.explain(model, ids, baseline_token_id=3, **options)
        assert found.shape == (5,) and not found.requires_grad
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    model.zero_grad()
    with torch.inference_mode():
        both = gim.explain(model, IDS, baseline_token_id=3)
    assert all(p.grad is None for p in model.parameters()) and hooks_of(model) == 0
    for row, found in zip(IDS, both, strict=True):
        torch.testing.assert_close(found, gim.explain(model, row, baseline_token_id=3))


@peers
def test_explain_of_a_hugging_face_model_is_the_packages_and_with_its_rule_of_mlps_the_papers():
    theirs = package()
    # both rules act there; what it leaves out is left out
    model = made("gpt2", attn_implementation="sdpa")
    options = {"softmax_temperature": None, "baseline_token_id": 3}
    torch.testing.assert_close(
        gim.explain(model, IDS[0], **options),
        theirs.explain(model, IDS[0], **options),
        rtol=1e-5,
        atol=1e-7,
    )
    # with its rule of MLPs it is the paper's
    llama = made("llama")
    found = gim.explain(llama, IDS[0], target_token_id=7, baseline_token_id=3, mlp_scale=0.5)
    paper = Rules(norm="frozen", softmax=2.0, query=0.25, key=0.25, value=0.5, gate=0.5, up=0.5)
    truth = oracle(llama, IDS[:1], paper)
    grad = torch.autograd.grad(truth.logits[0, -1, 7], truth.x0)[0]
    table = llama.get_input_embeddings().weight.detach()
    expected = (grad[0] * (table[IDS[0]] - table[3])).sum(-1)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


class Tokenizer:
    def __init__(self, space=(), **ids):
        self.space = space
        for name, value in ids.items():
            setattr(self, f"{name}_token_id", value)

    def encode(self, text, add_special_tokens=True):
        assert text == " " and not add_special_tokens
        return list(self.space)


def test_the_baseline_is_a_space_else_padding_else_the_unknown():
    model = made("llama")
    expected = gim.explain(model, IDS[0], baseline_token_id=4)
    for tokenizer in (
        Tokenizer([4, 5], pad=1, unk=2),
        Tokenizer(pad=4, unk=2),
        Tokenizer(pad=None, unk=4),
        type("Plain", (), {"pad_token_id": 4})(),
    ):
        assert torch.equal(gim.explain(model, IDS[0], tokenizer=tokenizer), expected)
    with pytest.raises(ValueError, match="tokenizer must have a token for a space, padding or"):
        gim.explain(model, IDS[0], tokenizer=Tokenizer())


def test_what_is_refused():
    model = made("llama")
    for ids, options, message in (
        (IDS[0], {}, "baseline_token_id or tokenizer must be given, got neither"),
        (IDS[0], {"baseline_token_id": 50}, r"baseline_token_id must be in 0..49 .* got 50"),
        (IDS - 3, {"baseline_token_id": 3}, r"input_ids must be in 0..49 \(vocabulary\), got -1"),
        (IDS[None], {"baseline_token_id": 3}, r"input_ids must be .* got \[1, 2, 5\]"),
        (
            IDS[0],
            {"baseline_token_id": 3, "target_position": 5},
            r"target_position must be in -5..4 ",
        ),
        (
            IDS[0],
            {"baseline_token_id": 3, "target_token_id": 50},
            r"target_token_id must be in 0..49 ",
        ),
    ):
        with pytest.raises(ValueError, match=f"^explain: {message}"):
            gim.explain(model, ids, **options)
    with pytest.raises(ValueError, match="explain: model must be a Hugging Face decoder"):
        gim.explain(torch.nn.Linear(2, 2), IDS[0], baseline_token_id=3)
    with pytest.raises(ValueError, match="softmax must be a temperature above 0, got -1"):
        gim.GIM(model, softmax_temperature=-1).__enter__()
    with gim.GIM(model, **OFF):
        off = gradient(model)
    assert torch.equal(off, gradient(model)) and hooks_of(model) == 0


def test_attention_with_sinks_is_refused_and_not_passed_by():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.GptOssForCausalLM(
        transformers.GptOssConfig(
            vocab_size=50, hidden_size=24, intermediate_size=40, num_hidden_layers=2, head_dim=8,
            num_attention_heads=4, num_key_value_heads=2, num_local_experts=4,
            num_experts_per_tok=2, pad_token_id=0,
        )
    ).eval()  # fmt: skip
    plain = gradient(model)
    for options, _ in (NORM, QKV):
        with gim.GIM(model, **options):
            assert (gradient(model) - plain).norm() > 1e-3 * plain.norm()
    message = "rules: softmax must act on attention without s_aux, got model.layers.0.self_attn"
    with pytest.raises(ValueError, match=message), gim.GIM(model):
        gradient(model)
    assert hooks_of(model) == 0
