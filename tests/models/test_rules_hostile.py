# SPDX-License-Identifier: Apache-2.0
"""Backward rules in models and uses out of the ordinary: the truth, or an error with the place."""

import contextvars
import copy
import pickle
import threading
import warnings

import pytest
import torch
from decoder_cases import IDS, TOKENS, hooks_of, made, tiny
from rules_oracle import oracle
from torch.utils.checkpoint import checkpoint

from mikernels.models.rules import PRESETS, Rules, rules

FROZEN = Rules(norm="frozen")


def embedded(model):
    return model.get_input_embeddings()(IDS).detach().requires_grad_()


def score(model, x, **options):
    return model(inputs_embeds=x, use_cache=False, **options).logits[:, -1, 7].sum()


def backward(model, **options):
    x = embedded(model)
    score(model, x, **options).backward()
    return x.grad


def of(model, *args, inputs=None, **options):
    with rules(model, *args, **options):
        return backward(model, **inputs or {})


def near(found, expected, limit=1e-5):
    """As near as transformers' norms and eager attention are, which compute in fp32."""
    assert (found - expected).abs().max() <= limit * expected.abs().max()


def truth(model, said):
    found = oracle(model, IDS, said)
    return torch.autograd.grad(found.logits[:, -1, 7].sum(), found.x0)[0]


class Around(torch.nn.Module):
    def __init__(self, inner, **names):
        super().__init__()
        self.inner, self.names = inner, names

    def forward(self, x):
        return self.inner(hidden_states=x) if self.names else self.inner(x)


class Same(torch.nn.Module):
    def forward(self, w):
        return w.clone()


def test_norms_count_however_they_are_wrapped_and_called():
    model = tiny("llama")
    expected = of(model, FROZEN)
    first, second, _ = model.model.layers
    model.model.norm = Around(model.model.norm)
    first.input_layernorm = Around(first.input_layernorm, keyword=True)
    norm = second.input_layernorm
    torch.nn.utils.parametrize.register_parametrization(norm, "weight", Same())
    with rules(model, FROZEN) as report:
        assert torch.equal(backward(model), expected)
    assert report["norm"].acted == report["norm"].places == 7


@pytest.mark.parametrize(
    ("name", "value"),
    [("gemma3_text", 0.0), ("gemma3_text", torch.nan), ("gpt2", torch.nan), ("gpt2", "no mean")],
)
def test_what_a_norm_computes_is_known_where_the_first_batch_does_not_tell(name, value):
    model = made(name)
    if value == "no mean":
        with torch.no_grad():
            for part, p in model.named_parameters():
                if part.endswith(("wte.weight", "wpe.weight", "c_proj.weight", "c_proj.bias")):
                    p -= p.mean(-1, keepdim=True)
        near(of(model, FROZEN), truth(model, FROZEN))
        return
    with rules(model, FROZEN):
        x = torch.full((1, 3, 24), value, dtype=torch.float64, requires_grad=True)
        model(inputs_embeds=x, use_cache=False).logits.sum().backward()
        near(backward(model), truth(model, FROZEN))


def test_norms_of_several_heads_and_of_nothing():
    """Against products with the constants that the norms were."""

    def freeze(module, args, output):
        x, bias = args[0], getattr(module, "bias", None)
        x = x - x.mean(-1, keepdim=True) if "Layer" in type(module).__name__ else x
        return x * (output / x).detach() if bias is None else x * ((output - bias) / x).detach()

    model = made("cohere", use_qk_norm=True)  # gains [H, dh]
    model.model.layers[1].input_layernorm = torch.nn.RMSNorm(24, eps=None).double()
    model.model.layers[2].input_layernorm = torch.nn.LayerNorm(24, bias=False).double()
    with rules(model, FROZEN) as report:
        found = backward(model)
    assert report["norm"].acted == 10
    for module in model.modules():
        if type(module).__name__.endswith("Norm"):
            module.register_forward_hook(freeze)
    near(found, backward(model))


def test_eps_of_a_norm_that_names_none():
    """In 16 bits: rows that are small beside the eps of their dtype, and not of float32."""
    model = tiny("llama", torch.bfloat16)
    for block in model.model.layers:
        block.input_layernorm = torch.nn.RMSNorm(24, eps=None, dtype=torch.bfloat16)
    exact = copy.deepcopy(model).double()
    for block in exact.model.layers:
        block.input_layernorm.eps = torch.finfo(torch.float32).eps
    small = embedded(model).detach() / 100

    def run(one):
        x = small.to(one.dtype, copy=True).requires_grad_()
        with rules(one, norm="frozen", layers=[0]):
            backward(one)  # of another size
            score(one, x).backward()
        return x.grad.double()

    near(run(model), run(exact), 0.1)


class Gamma(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.gamma = torch.nn.Parameter(torch.ones(24, dtype=torch.float64))

    def forward(self, x):
        return self.gamma * x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt()


def test_norms_that_are_none_are_refused():
    for norm, message in (
        (Gamma(), "with a parameter gamma"),
        (torch.nn.BatchNorm1d(5).double().eval(), r"which makes .* with \[5\] gains"),
    ):
        model = tiny("llama")
        model.model.layers[1].input_layernorm = norm
        with pytest.raises(ValueError, match=f"norm must .* model.layers.1.input_.*{message}"):
            of(model, FROZEN)


def test_offloaded_weights_are_refused():
    accelerate = pytest.importorskip("accelerate")
    model = tiny("llama")
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match="norm must have its weight .* model.layers.0.input_layer"):
        of(model, "gim")


def test_hooks_of_others_change_what_the_rules_left():
    """Also those that were there before, and begin to act after the first batch."""
    model, same = tiny("llama"), tiny("llama")
    block, acting = model.model.layers[1], []
    block.input_layernorm.register_forward_hook(lambda m, args, y: 2 * y if acting else None)
    block.self_attn.register_forward_hook(lambda m, args, y: (3 * y[0], *y[1:]) if acting else None)
    block.mlp.down_proj.register_forward_pre_hook(lambda m, args: (2 * args[0],))
    with torch.no_grad():
        same.model.layers[1].mlp.down_proj.weight *= 2
    with rules(model, "gim"):
        near(backward(model), truth(same, PRESETS["gim"]))
        acting.append(True)
        with torch.no_grad():
            same.model.layers[1].input_layernorm.weight *= 2
            same.model.layers[1].self_attn.o_proj.weight *= 3
        near(backward(model), truth(same, PRESETS["gim"]))


def test_hooks_of_others_may_change_outputs_in_place():
    said = Rules(norm="frozen", activation="secant", up=0.5)
    model = tiny("llama")
    layer, found = model.model.layers[1], []

    def edit(module, args, y):
        y[:, 1:3] *= 2
        return y

    for hook in (edit, lambda module, args, y: edit(module, args, y.clone())):
        with rules(model, said):
            backward(model)
            hooks = [
                part.register_forward_hook(hook)
                for part in (layer.input_layernorm, layer.mlp.up_proj)
            ]
            found.append(backward(model))
        for one in hooks:
            one.remove()
    assert torch.equal(*found) and not torch.equal(found[0], of(model, said))


def test_modules_that_blocks_share():
    model = made("gpt2")
    blocks = model.transformer.h
    for block in blocks:
        block.mlp.act = blocks[0].mlp.act
    near(of(model, activation="secant"), truth(model, Rules(activation="secant")))
    with pytest.raises(ValueError, match="layers must be all those that share transformer.h.0.mlp"):
        of(model, activation="secant", layers=[2])
    model = made("mixtral")
    expected = of(model, gate=0.3, up=0.7)
    for block in model.model.layers:
        block.mlp.experts.act_fn = model.model.layers[0].mlp.experts.act_fn
    assert torch.equal(of(model, gate=0.3, up=0.7), expected)


def test_weights_of_experts_have_the_factors_too():
    model = made("mixtral")
    weight = model.model.layers[1].mlp.experts.gate_up_proj
    backward(model)
    plain, weight.grad = weight.grad, None
    of(model, gate=0.3, up=0.0, layers=[1])
    gate, up = plain.chunk(2, 1)
    torch.testing.assert_close(weight.grad, torch.cat([0.3 * gate, 0 * up], 1))


def test_gated_products_without_modules_are_refused_not_left_out():
    model = tiny("llama")
    for block in model.model.layers:
        del block.mlp.act_fn
        block.mlp.act_fn = torch.nn.functional.silu
    shared = tiny(
        "granitemoeshared", torch.float32, num_local_experts=4, shared_intermediate_size=16
    )
    for one, place in ((model, "model.layers.0.mlp, a Llama"), (shared, "model.layers.0.shared_m")):
        with pytest.raises(ValueError, match=f"gate and up must act on .* got {place}"):
            of(one, "gim")
        assert hooks_of(one) == 0
        of(one, "plain")
    with pytest.raises(ValueError, match="gate and up must act on"):
        of(model, activation="secant")


def test_parts_that_are_not_called_as_modules():
    def functional(self, x):
        gate, up, down = (p.weight for p in (self.gate_proj, self.up_proj, self.down_proj))
        linear, silu = torch.nn.functional.linear, torch.nn.functional.silu
        return linear(silu(linear(x, gate)) * linear(x, up), down)

    def keywords(self, x):
        h = self.act_fn(input=self.gate_proj(input=x)) * self.up_proj(input=x)
        return self.down_proj(input=h)

    for said, rule in (({"gate": 0.5}, "gate"), ({"activation": "secant"}, "activation")):
        model = tiny("llama")
        mlp = model.model.layers[1].mlp
        kind = type(mlp)
        mlp.__class__ = type("Functional", (kind,), {"forward": functional})
        with pytest.raises(
            RuntimeError, match=f"{rule} must act on model.layers.1.mlp.*, which ra"
        ):
            of(model, **said)
        mlp.__class__ = type("Keywords", (kind,), {"forward": keywords})
        near(of(model, **said), truth(model, Rules(**said)))
    model = made("mixtral")
    act = model.model.layers[1].mlp.experts.act_fn
    unhooked = {"__call__": lambda self, x: torch.nn.functional.silu(x)}
    act.__class__ = type("Unhooked", (type(act),), unhooked)
    with pytest.raises(
        RuntimeError, match="gate must act on model.layers.1.mlp.experts, which ran"
    ):
        of(model, gate=0.5, up=0.5)


def test_activations_that_are_not_elementwise_are_refused():
    model = made("gpt2")
    for act, why in ((torch.nn.Softmax(-1), "depends on oth"), (torch.nn.ReLU(True), "overwrites")):
        model.transformer.h[1].mlp.act = act
        with pytest.raises(ValueError, match=f"activation must .* transformer.h.1.mlp.act .*{why}"):
            of(model, activation="secant")


def test_numbers_that_are_not_finite_pass_and_are_reported():
    model = tiny("llama")
    with rules(model, "gim") as report:
        x = torch.full((1, 3, 24), torch.inf, dtype=torch.float64, requires_grad=True)
        model(inputs_embeds=x, use_cache=False).logits.sum().backward()
    assert x.grad.isnan().all()
    assert all(report[rule].change != report[rule].change for rule in ("norm", "softmax"))


def test_the_report_does_not_grow():
    model = tiny("llama")
    with rules(model, "gim") as report:
        backward(model)
        kept, change = sum(map(len, report._changes.values())), report["softmax"].change
        backward(model)
        assert sum(map(len, report._changes.values())) == kept
    assert report["softmax"].change == pytest.approx(change)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_under_autocast(name):
    model, exact = made(name, torch.float32), made(name)
    exact.load_state_dict(model.state_dict())
    with torch.autocast("cpu", torch.bfloat16):
        plain = backward(model).double() - truth(exact, Rules())
        found = of(model, "gim", attention="fused").double()
    expected = truth(exact, PRESETS["gim"])
    assert (found - expected).norm() <= 2 * plain.norm()


def own_attention(module, q, k, v, mask, scaling=None, **options):
    k, v = (t.repeat_interleave(module.num_key_value_groups, 1) for t in (k, v))
    scores = q @ k.mT * (module.scaling if scaling is None else scaling)
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    p = scores.masked_fill(future, -torch.inf).softmax(-1)
    return (p @ v).transpose(1, 2).contiguous(), None


def deaf(module, q, k, v, mask, scaling=None, **options):
    return own_attention(module, q, k, v, mask)


def test_attention_functions():
    from transformers import AttentionInterface

    AttentionInterface.register("own", own_attention)
    AttentionInterface.register("deaf", deaf)
    said = Rules(softmax=2.0)
    model = tiny("llama", attn_implementation="own")
    near(of(model, said, attention="two-pass"), truth(model, said))
    with torch.no_grad():  # scores of 0 are the same at every temperature
        model.model.layers[1].self_attn.q_proj.weight.zero_()
    near(of(model, said, attention="two-pass"), truth(model, said))
    padding = {"attention_mask": torch.zeros_like(IDS)}  # eager masks leave nothing of scores
    small = tiny("llama", torch.float32, attn_implementation="eager")
    assert of(small, said, attention="two-pass", inputs=padding).isfinite().all()
    model.set_attn_implementation("deaf")
    near(of(model, said, attention="fused"), truth(model, said))
    with pytest.raises(
        ValueError, match="softmax must .* heeds .* scaling, got model.layers.2.sel"
    ):
        of(model, said, attention="two-pass")


def test_masks():
    from transformers import AttentionInterface, AttentionMaskInterface

    model = tiny("llama", attn_implementation="eager")
    seen = torch.ones(2, 1, 5, 5, dtype=torch.bool).tril()
    with pytest.raises(
        ValueError, match="attention_mask must be of a floating dtype .* torch.bool"
    ):
        of(model, softmax=2.0, attention="two-pass", inputs={"attention_mask": seen})
    bias = torch.zeros(2, 1, 5, 5, dtype=torch.float64).masked_fill(~seen, -torch.inf)
    bias.requires_grad_()
    with pytest.raises(ValueError, match="whose mask is a constant, got model.layers.0.self_attn"):
        of(model, softmax=2.0, inputs={"attention_mask": bias})
    of(model, softmax="frozen", inputs={"attention_mask": bias})
    assert bias.grad is None
    # as of flex attention
    AttentionInterface.register("other", own_attention)
    AttentionMaskInterface.register("other", lambda *args, **options: IDS.tolist())
    model.set_attn_implementation("other")
    with pytest.raises(
        ValueError, match="whose mask is a tensor, got model.layers.0.self_attn .*list"
    ):
        of(model, softmax=2.0, attention="fused")
    near(of(model, softmax=2.0, attention="two-pass"), truth(model, Rules(softmax=2.0)))


def test_attention_with_sinks_is_refused_either_way():
    sizes = {"head_dim": 8, "num_key_value_heads": 2, "num_local_experts": 4}
    model = tiny("gpt_oss", torch.float32, attn_implementation="eager", **sizes)
    for way in ("fused", "two-pass"):
        with pytest.raises(ValueError, match="attention without s_aux, got model.layers.0.self_a"):
            of(model, softmax=2.0, attention=way)


def test_a_mask_given_by_keyword():
    model = tiny("doge", num_key_value_heads=2)
    expected = backward(model)
    assert torch.equal(of(model, "plain"), expected)
    assert not torch.equal(of(model, value=0.5), expected)


def test_cross_attention_counts_and_encoders_are_refused():
    transformers = pytest.importorskip("transformers")
    model = made("gpt2", add_cross_attention=True)
    other = torch.randn(2, 4, 24, dtype=torch.float64)
    found = []
    for way in ("fused", "two-pass"):
        with rules(model, "gim", attention=way) as report:
            found.append(backward(model, encoder_hidden_states=other))
        assert report["softmax"].acted == report["query"].places == 6
    near(*found, limit=1e-12)
    sizes = {f"{part}_{name}": n for part in ("encoder", "decoder") for name, n in (
        ("layers", 2), ("attention_heads", 2), ("ffn_dim", 8))}  # fmt: skip
    both = torch.nn.ModuleList([tiny("llama"), tiny("llama")])
    both.config = both[0].config
    with pytest.raises(ValueError, match="it has several lists of 3 blocks with attention; give"):
        of(both, "gim")
    config = transformers.BartConfig(vocab_size=50, d_model=8, **sizes, **TOKENS)
    with pytest.raises(ValueError, match="it has an encoder beside its decoder"):
        of(transformers.BartForConditionalGeneration(config).eval(), "gim")


def checkpointed(reentrant):
    model = tiny("llama")
    for block in model.model.layers:
        whole = block.forward

        def forward(x, *args, whole=whole, **kwargs):
            return checkpoint(lambda x: whole(x, *args, **kwargs), x, use_reentrant=reentrant)

        block.forward = forward
    return model


def test_checkpoints():
    expected = of(tiny("llama"), "gim")
    for way in ("fused", "two-pass"):
        near(of(checkpointed(False), "gim", attention=way), expected, 1e-12)
    with pytest.raises(RuntimeError, match="got model.layers.0.input_layernorm in a checkpoint"):
        of(checkpointed(True), "gim")


def test_gradients_of_gradients_and_batches_of_them_are_refused():
    model = tiny("llama").requires_grad_(False)
    for said, way in (({"softmax": 2.0}, "fused"), ({"softmax": 2.0}, "two-pass"), (FROZEN, None)):
        said = said if isinstance(said, Rules) else Rules(**said)
        with rules(model, said, attention=way):
            x = embedded(model)
            (grad,) = torch.autograd.grad(score(model, x), x, create_graph=True)
            with pytest.raises(RuntimeError, match="rules: .* must be differentiated once"):
                torch.autograd.grad(grad.square().sum(), x)
            y = embedded(model)
            total = score(model, y)
            with pytest.raises(RuntimeError, match="rules: gradients must be computed one at a"):
                torch.autograd.grad(total, y, torch.ones(2), is_grads_batched=True)


def test_copies_are_made_outside_of_the_block():
    model = tiny("llama")
    expected = of(model, "gim")
    for said in ("gim", FROZEN):
        with rules(model, said):
            backward(model)
            for take in (copy.deepcopy, pickle.dumps):
                with pytest.raises(RuntimeError, match="rules: a model must be copied or pickled"):
                    take(model)
    assert torch.equal(of(copy.deepcopy(model), "gim"), expected)


def test_a_context_that_outlives_a_block():
    model = tiny("llama")
    expected = of(model, "gim")
    with rules(model, "gim"):
        with rules(model, "plain"):
            backward(model)
            context = contextvars.copy_context()
        assert torch.equal(context.run(backward, model), expected)


def test_gradients_of_projections_alone():
    model = tiny("llama").requires_grad_(False)
    model.model.layers[0].self_attn.q_proj.weight.requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with rules(model, query=0.25, layers=[0]) as report:
            model(IDS).logits.sum().backward()
    assert report["query"].acted == 1


def test_a_thread_that_runs_the_model_while_hooks_come_and_go():
    """torch registers a hook first, and then that it takes keywords."""
    model, found = made("mixtral"), []
    plain = backward(model)
    with rules(model, "gim"):
        ruled = backward(model)
        for module in model.modules():
            module._forward_hooks_with_kwargs.clear()
            module._forward_pre_hooks_with_kwargs.clear()
        thread = threading.Thread(target=lambda: found.append(backward(model)))
        thread.start()
        thread.join()
    assert torch.equal(found[0], plain) and not torch.equal(plain, ruled)


def test_hooks_that_accelerate_adds_in_the_block_stay():
    hooks = pytest.importorskip("accelerate.hooks")
    model = tiny("llama")
    expected, attention = backward(model), model.model.layers[1].self_attn
    with rules(model, "gim"):
        backward(model)
        hooks.add_hook_to_module(attention, hooks.ModelHook())
    assert "forward" in vars(attention)
    assert vars(attention)["_old_forward"].__func__ is type(attention).forward
    assert torch.equal(backward(model), expected)


def test_layers():
    model = tiny("llama")
    assert torch.equal(of(model, "gim", layers=1), of(model, "gim", layers=[1]))
    with pytest.raises(ValueError, match=r"layers must be some of 0..2 .* got \[\]"):
        of(model, "gim", layers=[])
