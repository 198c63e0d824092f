# SPDX-License-Identifier: Apache-2.0
"""The oracle of backward rules is transformers' model without them, and with them what they say."""

import pytest
import torch
from decoder_cases import HARD, IDS, made, padded
from doubles import Doubles
from rules_algebra import Rules, activated, gated, normed, pattern, scaled
from rules_cases import ALL, PLAIN_MLP, batches, score, theirs
from rules_oracle import oracle
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


def close(found, expected):
    """In double precision: nothing but the order of sums differs."""
    scale = expected.abs().max()
    assert scale > 1e-3
    assert (found - expected).abs().max() <= 1e-11 * scale


def check(model, batch, rules=None, modes=()):
    logits, grads = theirs(model, batch, (Doubles(), *modes))
    kept = batch["attention_mask"] == 1
    found = oracle(model, batch, rules)
    close(found.logits[kept], logits)
    reads = [found.x0, *found.stream[:-1]]
    mine = torch.autograd.grad(score(found.logits, kept), reads)
    for one, expected in zip(mine, grads, strict=True):
        close(one, expected)
        assert not one[~kept].any()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", HARD)
def test_without_rules_it_is_the_model(name, attention):
    # for Gemma 2 transformers has no sdpa, which has no soft-cap
    if (name, attention) != ("gemma2", "sdpa"):
        model = made(name, attn_implementation=attention, **HARD[name])
        for batch in batches():
            check(model, batch)


class Tempered(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scores, temperature):
        ctx.save_for_backward((scores / temperature).softmax(-1))
        return scores.softmax(-1)

    @staticmethod
    def backward(ctx, grad):
        (p,) = ctx.saved_tensors
        return p * (grad - (grad * p).sum(-1, keepdim=True)), None


class Times(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return ctx.factor * grad, None


class Ruled(TorchFunctionMode):
    """The rules where transformers' eager model calls torch, and by hooks on its modules.

    A norm or an activation is a product with a constant, which is what came out over what went in.
    """

    def __init__(self, model, rules, gated):
        super().__init__()
        self.rules, self.active, self.products = rules, None, 0
        for module in model.modules():
            if type(module).__name__.endswith("Norm"):
                module.register_forward_hook(self.norm)
            if type(module).__name__.endswith(("Activation", "GELUTanh", "ReLU")):
                module.register_forward_hook(self.gate if gated else self.secant)

    def norm(self, module, args, output):
        (x,), bias = args, getattr(module, "bias", None)
        if bias is None:
            return x * (output / x).detach()
        x = x - x.mean(-1, keepdim=True)
        return x * ((output - bias) / x).detach() + bias

    def secant(self, module, args, output):
        return args[0] * (output / args[0]).detach()

    def gate(self, module, args, output):
        self.active = Times.apply(self.secant(module, args, output), self.rules.gate)
        return self.active

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = func.__name__
        if name == "softmax" and args[0].ndim == 4:  # a router's has 2
            return Tempered.apply(args[0], self.rules.softmax)
        if name == "matmul" and args[0].ndim == 4:
            self.products += 1
            scores = self.rules.query, self.rules.key
            factors = scores if self.products % 2 else (1.0, self.rules.value)
            args = [Times.apply(arg, f) for arg, f in zip(args, factors, strict=True)]
        if name in ("mul", "__mul__") and any(arg is self.active for arg in args):
            args = [a if a is self.active else Times.apply(a, self.rules.up) for a in args]
            self.active = None
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("name", HARD)
def test_with_all_rules_it_is_the_model_with_the_rules_put_in_by_hand(name):
    model = made(name, attn_implementation="eager", **HARD[name])
    mode = Ruled(model, ALL, name not in PLAIN_MLP)
    check(model, padded("left"), ALL, [mode])
    assert mode.products == 6 and mode.active is None


def test_rules_of_one_place_act_there_and_nowhere_else():
    model = made("qwen3", **HARD["qwen3"])
    plain, ruled = oracle(model, IDS), oracle(model, IDS, ALL)
    some = oracle(model, IDS, for_layers={1: ALL, "final": ALL})
    found = torch.autograd.grad(some.logits[:, -1, 7].sum(), some.stream)
    (grad,) = torch.autograd.grad(ruled.logits[:, -1, 7].sum(), ruled.stream[3], retain_graph=True)
    close(found[3], grad)
    for layer, by in ((2, plain), (1, ruled), (0, plain)):
        ends = by.stream[layer + 1], by.stream[layer]
        (grad,) = torch.autograd.grad(*ends, grad, retain_graph=True)
        close(found[layer], grad)
    everywhere = oracle(model, IDS, for_layers=lambda place: ALL)
    assert torch.equal(
        *(torch.autograd.grad(r.logits[:, -1, 7].sum(), r.x0)[0] for r in (everywhere, ruled))
    )


def jacobian(f, x):
    return torch.autograd.functional.jacobian(f, x)


def test_a_frozen_norm_is_one_scale_and_still_takes_the_mean_away():
    x = torch.tensor([3.0, -1.0, 2.0, 4.0], dtype=torch.float64)
    eye, ones = torch.eye(4, dtype=torch.float64), torch.ones(4, 4, dtype=torch.float64)
    for centred, linear, square in ((False, eye, 7.5), (True, eye - ones / 4, 3.5)):
        kept = {"centred": centred, "rule": "frozen"}
        assert torch.equal(normed(x, 0.5, **kept), normed(x, 0.5, centred=centred, rule=None))
        found = jacobian(lambda x, kept=kept: normed(x, 0.5, **kept), x)
        close(found, linear / (square + 0.5) ** 0.5)
    with pytest.raises(KeyError):
        normed(x, 0.5, centred=True, rule="freeze")


def test_a_softmax_of_a_temperature_has_the_pattern_of_that_temperature_as_its_gradient():
    scores = torch.tensor([0.5, -1.0, 2.0, -torch.inf], dtype=torch.float64)
    for temperature in (1.0, 2.0, 3.0):
        p = (scores / temperature).exp()
        p = p / p.sum()
        assert torch.equal(pattern(scores, temperature), scores.softmax(-1))
        found = jacobian(lambda s, t=temperature: pattern(s, t), scores)
        close(found, p.diag() - torch.outer(p, p))
    assert not pattern(scores.requires_grad_(), "frozen").requires_grad


@pytest.mark.parametrize(("f", "slope"), [(F.silu, 0.5), (F.gelu, 0.5), (F.relu, 0.0)])
def test_a_secant_is_the_slope_from_the_origin_and_the_derivative_at_it(f, slope):
    x = torch.tensor([-2.0, -0.0, 0.0, 1.5], dtype=torch.float64)
    assert torch.equal(activated(x, f, "secant"), f(x))
    found = jacobian(lambda x: activated(x, f, "secant"), x)
    y = f(x)
    expected = torch.stack([y[0] / -2, x[1] + slope, x[2] + slope, y[3] / 1.5])
    assert torch.equal(found, expected.diag())


def test_factors_change_gradients_and_no_bit_of_a_value():
    x = torch.randn(100, dtype=torch.bfloat16, requires_grad=True)
    y = scaled(x, 0.25)
    assert torch.equal(y, x)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.full_like(x, 0.25))
    gate, up = (torch.randn(9, dtype=torch.float64, requires_grad=True) for _ in range(2))
    y = gated(gate, up, F.silu, Rules(gate=0.25, up=0.75))
    assert torch.equal(y, F.silu(gate) * up)
    plain = torch.autograd.grad((F.silu(gate) * up).sum(), (gate, up))
    found = torch.autograd.grad(y.sum(), (gate, up))
    close(found[0], 0.25 * plain[0])
    close(found[1], 0.75 * plain[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_in_a_smaller_dtype_it_rounds_as_the_model_does(dtype):
    for name in ("llama", "gemma3_text", "gpt2"):
        model = made(name, dtype, attn_implementation="eager", **HARD[name])
        logits = model(IDS, use_cache=False).logits
        truth = oracle(model, IDS).logits
        found = oracle(model, IDS, dtype=dtype).logits
        assert found.dtype == dtype
        error, expected = ((y - truth).abs().mean() for y in (found, logits))
        assert 0.5 * expected <= error <= 2 * expected


def test_the_experts_it_chose_are_the_models():
    model = made("qwen2_moe", **HARD["qwen2_moe"])
    found = oracle(model, IDS).chosen
    logits = model(IDS, output_router_logits=True, use_cache=False).router_logits
    assert len(found) == len(logits) == 2  # the block between has none
    for chosen, row in zip(found, logits, strict=True):
        assert torch.equal(chosen.flatten(0, 1), row.topk(2, -1).indices)
