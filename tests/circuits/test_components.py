# SPDX-License-Identifier: Apache-2.0
"""Gradients at the components of decoders, against finite differences in fp64."""

import pytest
import torch
from decoder_cases import IDS, KINDS, hooks_of, parts, tiny
from oracle import randn

from mikernels.circuits import compute_gradient_interactions, gradient_components


def in_double(model):
    """Its norms without the rounding to fp32 that finite differences would measure."""
    for parent in list(model.modules()):
        for name, module in parent.named_children():
            if type(module).__name__ == "LlamaRMSNorm":
                norm = torch.nn.RMSNorm(24, module.variance_epsilon, dtype=torch.float64)
                norm.weight.data.copy_(module.weight)
                setattr(parent, name, norm)
    return model


STEP = 1e-5


def slope(model, module, direction, target, before=False):
    """d logit / d step, by central differences, of moving what a module returns (or receives)."""
    logits = []
    for sign in (STEP, -STEP):

        def move(_, args, output=None, sign=sign):
            if before:
                return (args[0] + sign * direction, *args[1:])
            first = output[0] if isinstance(output, tuple) else output
            moved = first + sign * direction
            return (moved, *output[1:]) if isinstance(output, tuple) else moved

        hook = module.register_forward_pre_hook if before else module.register_forward_hook
        handle = hook(move)
        with torch.no_grad():
            last = model(IDS).logits[:, -1]
        handle.remove()
        logits.append(last[torch.arange(len(IDS)), target].sum())
    return (logits[0] - logits[1]) / (2 * STEP)


@pytest.mark.parametrize("kind", KINDS)
def test_components_are_the_gradient(kind):
    model = in_double(tiny(kind))
    target = torch.tensor([7, 11])
    found = gradient_components(model, IDS, target)
    assert list(found) == [f"L{i}.{part}" for i in range(3) for part in ("attn", "mlp")]
    for seed, (name, grad) in enumerate(found.items()):
        assert grad.shape == (2, 5, 24) and not grad.requires_grad
        attention, _, mlp = parts(model, int(name[1]))
        direction = randn(2, 5, 24, dtype=torch.float64, seed=seed)
        measured = slope(model, mlp if "mlp" in name else attention, direction, target)
        torch.testing.assert_close((grad * direction).sum(), measured, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_heads_are_the_gradient_at_z_in_the_residual_stream(kind):
    model = in_double(tiny(kind))
    target = torch.tensor([7, 11])
    found = gradient_components(model, IDS, target, heads=True)
    assert [name for name in found if "L1" in name] == [f"L1.h{h}" for h in range(4)] + ["L1.mlp"]
    for layer in (0, 2):
        projection = parts(model, layer)[1]
        w_o = projection.weight.detach() if kind == "gpt2" else projection.weight.detach().T
        for h in range(4):
            # <g_z W_O, r> = <g_z, r W_O^T>: z moves so, in this head alone
            r = randn(2, 5, 24, dtype=torch.float64, seed=4 * layer + h)
            direction = torch.zeros(2, 5, 24, dtype=torch.float64)
            own = slice(6 * h, 6 * h + 6)
            direction[..., own] = r @ w_o[own].T
            measured = slope(model, projection, direction, target, before=True)
            got = (found[f"L{layer}.h{h}"] * r).sum()
            torch.testing.assert_close(got, measured, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_attribution_is_gradient_times_output_and_heads_add_up(kind):
    model = tiny(kind)
    outputs, handles = {}, []
    for layer in range(3):
        attention, _, mlp = parts(model, layer)
        for name, module in ((f"L{layer}.attn", attention), (f"L{layer}.mlp", mlp)):

            def keep(module, args, output, name=name):
                outputs[name] = output[0] if isinstance(output, tuple) else output

            handles.append(module.register_forward_hook(keep))
    grads = gradient_components(model, IDS)
    for handle in handles:
        handle.remove()
    found = gradient_components(model, IDS, attribution=True)
    heads = gradient_components(model, IDS, heads=True, attribution=True)
    for name, grad in grads.items():
        assert torch.equal(found[name], grad * outputs[name])
    for layer in range(3):
        bias = parts(model, layer)[1].bias
        rest = 0 if bias is None else bias.detach() * grads[f"L{layer}.attn"]
        total = sum(heads[f"L{layer}.h{h}"] for h in range(4)) + rest
        torch.testing.assert_close(total, found[f"L{layer}.attn"])
        assert torch.equal(heads[f"L{layer}.mlp"], found[f"L{layer}.mlp"])


def test_target_is_the_prediction_by_default_and_padding_is_not_the_last_position():
    model = tiny("llama")
    with torch.no_grad():
        predicted = model(IDS).logits[:, -1].argmax(-1)
    found = gradient_components(model, IDS)
    for name, grad in gradient_components(model, IDS, predicted).items():
        assert torch.equal(grad, found[name])
    one = gradient_components(model, IDS[:1], 7)
    both = gradient_components(model, IDS, 7)
    padded = {
        "input_ids": torch.tensor([[3, 14, 15, 9, 2, 0, 0], [0, 0, 6, 5, 35, 8, 9]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1, 1]]),
    }
    for name, grad in gradient_components(model, padded, 7).items():
        torch.testing.assert_close(both[name][:1], one[name])
        torch.testing.assert_close(grad[0, :5], both[name][0])
        torch.testing.assert_close(grad[1, 2:], both[name][1])
        assert not grad[0, 5:].any() and not grad[1, :2].any()


@pytest.mark.parametrize("heads", [False, True])
def test_model_is_as_before_and_no_weight_gradient_is_made(heads):
    model = tiny("llama")
    flags = {name: i % 3 > 0 for i, (name, _) in enumerate(model.named_parameters())}
    for name, p in model.named_parameters():
        p.requires_grad_(flags[name])
    seen = []
    handle = parts(model, 2)[2].register_forward_hook(
        lambda *_: seen.append(any(p.requires_grad for p in model.parameters()))
    )
    before = hooks_of(model)

    def check():
        assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
        assert all(p.grad is None for p in model.parameters())
        assert hooks_of(model) == before

    gradient_components(model, IDS, heads=heads)
    check()
    with torch.inference_mode():
        found = gradient_components(model, IDS, heads=heads)
    check()
    assert seen == [False, False]
    with torch.no_grad():
        for name, grad in gradient_components(model, IDS, heads=heads).items():
            assert torch.equal(grad, found[name])
    for bad in ({"target": 50}, {"inputs": IDS + 1000}):
        with pytest.raises((ValueError, IndexError)):
            gradient_components(model, **{"inputs": IDS, "heads": heads, **bad})
        check()
    handle.remove()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_low_precision_models_are_recognised(kind, dtype):
    found = gradient_components(tiny(kind, dtype), IDS, heads=True)
    assert {grad.dtype for grad in found.values()} == {dtype}
    scores = compute_gradient_interactions(found, normalize=True).scores
    assert len(scores) == 15 and scores.isfinite().all() and scores.dtype == torch.float32


def test_blocks_without_an_mlp_are_refused():
    model = tiny("llama")
    del model.model.layers[1].mlp
    reason = r"block 1 \(LlamaDecoderLayer\) has \['self_attn', "
    with pytest.raises(ValueError, match=f"must be a Hugging Face decoder .*{reason}.*hooks of"):
        gradient_components(model, IDS)
    assert hooks_of(model) == 0


def test_components_refuse():
    transformers = pytest.importorskip("transformers")
    model = tiny("llama")
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got str"):
        gradient_components("llama", IDS)
    with pytest.raises(ValueError, match=r"got Linear: no ModuleList of .* \(None\) blocks"):
        gradient_components(torch.nn.Linear(2, 2), IDS)
    with pytest.raises(ValueError, match="must return logits .*AutoModelForCausalLM"):
        gradient_components(transformers.LlamaModel(model.config).eval(), IDS)
    for inputs, target, message in (
        ("text", None, "inputs must be a tensor of token ids or a mapping .* got str"),
        (IDS[0], None, r"input_ids must be \[B, P\], not empty, got \[5\]"),
        ({"input_ids": IDS, "attention_mask": 0 * IDS}, None, "with a token in every row"),
        (IDS, 50, r"target must be in 0..49 \(vocabulary\), got 50"),
        (IDS, -1, "target must be in 0..49"),
        (IDS, torch.tensor([1, 2, 3]), r"or \[2\] of them, .* got torch.int64 \[3\]"),
        (IDS, 1.5, "must be a token .* got 1.5"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            gradient_components(model, inputs, target)
    with pytest.raises(ValueError, match=r"call model.eval\(\)"):
        gradient_components(tiny("llama").train(), IDS)
    shared = tiny("llama")
    shared.model.layers[2] = shared.model.layers[0]
    with pytest.raises(ValueError, match="blocks share modules"):
        gradient_components(shared, IDS)
    gated = tiny("llama")
    parts(gated, 1)[0].register_forward_hook(lambda m, args, out: (2 * out[0], *out[1:]))
    with pytest.raises(
        ValueError, match="attention of block 1 must return what its projection does: got"
    ):
        gradient_components(gated, IDS)
    wrapped = tiny("llama")
    wrapped.model.layers[1].self_attn.o_proj = torch.nn.Sequential(parts(wrapped, 1)[1])
    with pytest.raises(ValueError, match="the projection of block 1 is Sequential"):
        gradient_components(wrapped, IDS, heads=True)
