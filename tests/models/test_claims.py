# SPDX-License-Identifier: Apache-2.0
"""What a decomposition claims is checked on the batch: what changes it is refused with the place
and the numbers, what does not is accepted, down to rounding."""

import pytest
import torch
from decoder_cases import IDS, KINDS, hooks_of, parts, tiny

from mikernels.circuits import gradient_components

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def changed(model, layer, projection):
    attention = parts(model, layer)[0]
    name = next(n for n in ("o_proj", "c_proj", "dense") if hasattr(attention, n))
    setattr(attention, name, projection)
    return model


class Adapter(torch.nn.Module):
    """A low-rank update beside the layer, whose weight it shows, as adapters do."""

    def __init__(self, base, size):
        super().__init__()
        self.base, self.size = base, size
        width = base.weight.shape[0]
        self.down = torch.nn.Parameter(torch.eye(2, width, dtype=base.weight.dtype))
        self.up = torch.nn.Parameter(torch.ones(width, 2, dtype=base.weight.dtype))

    @property
    def weight(self):
        return self.base.weight

    @property
    def bias(self):
        return self.base.bias

    def forward(self, z):
        return self.base(z) + self.size * (z @ self.down.T @ self.up.T)


class Doubled(torch.nn.Linear):
    def forward(self, z):
        return 2 * super().forward(z)


def adapter(model, size=1.0):
    return changed(model, 1, Adapter(parts(model, 1)[1], size))


def small_adapter(model):
    # near what rounding can do: of the result, in 16 bits; of sums, in 32 and 64
    dtype = next(model.parameters()).dtype
    return adapter(model, (30 if dtype.itemsize == 2 else 1000) * torch.finfo(dtype).eps)


def subclass(model):
    base = parts(model, 1)[1]
    made = Doubled(24, 24, bias=False, dtype=base.weight.dtype)
    made.weight = base.weight
    return changed(model, 1, made.eval())


def projection_hook(model):
    parts(model, 1)[1].register_forward_hook(lambda m, args, out: out * 1.25)
    return model


def one_number(model):
    def hook(module, args, out):
        out = out.clone()
        out[1, 3, 5] += out.detach().abs().max() / 8
        return out

    parts(model, 1)[1].register_forward_hook(hook)
    return model


@pytest.mark.parametrize("change", [adapter, small_adapter, subclass, projection_hook, one_number])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_projections_that_compute_something_else(change, dtype):
    model = change(tiny("llama", dtype))
    where = r"the projection of block 1 must return z W_O \+ b \(\w+\): got .*, expected .* within"
    with pytest.raises(ValueError, match=f"{where}.*remove or merge what changes it"):
        gradient_components(model, IDS, heads=True)
    gradient_components(model, IDS)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_an_adapter_at_zero_is_the_layer():
    expected = gradient_components(tiny("llama"), IDS, heads=True)
    for name, part in gradient_components(adapter(tiny("llama"), 0.0), IDS, heads=True).items():
        assert torch.equal(part, expected[name])


def block_hook(model, layer=1):
    block = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))[layer]

    def hook(module, args, out):
        first = out[0] if isinstance(out, tuple) else out
        first = first.clone()
        first[0, 2, 7] += 0.01
        return (first, *out[1:]) if isinstance(out, tuple) else first

    block.register_forward_hook(hook)
    return model


def last_block_hook(model):
    return block_hook(model, 2)


def steering(model):
    block = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))[2]

    def hook(module, args, kwargs):
        if args:
            return (args[0] + 1e-5, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": kwargs["hidden_states"] + 1e-5}

    block.register_forward_pre_hook(hook, with_kwargs=True)
    return model


def final_norm(model):
    norm = {"llama": "model.norm", "gpt2": "transformer.ln_f"}
    norm = norm.get(model.config.model_type, "gpt_neox.final_layer_norm")
    model.get_submodule(norm).register_forward_pre_hook(lambda m, args: (args[0] * 1.001,))
    return model


def attention_hook(model):
    parts(model, 1)[0].register_forward_hook(lambda m, args, out: (out[0] + 1e-6, *out[1:]))
    return model


@pytest.mark.parametrize("heads", [False, True])
@pytest.mark.parametrize(
    ("change", "where"),
    [
        (block_hook, r"block 1 must return input \+ attention \+ mlp"),
        (last_block_hook, r"block 2 must return input \+ attention \+ mlp"),
        (steering, "block 2 must get what block 1 returned"),
        (final_norm, r"\w*Norm must get what the last block returned"),
        (attention_hook, "attention of block 1 must return what its projection does"),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_streams_that_writers_do_not_add_up_to(kind, dtype, change, where, heads):
    model = change(tiny(kind, dtype))
    before = hooks_of(model)
    with pytest.raises(ValueError, match=rf"{where}: got .*, expected .* at \[\d, \d, \d+\]"):
        gradient_components(model, IDS, heads=heads)
    assert hooks_of(model) == before


def stream_of(args, kwargs):
    return args[0] if args else kwargs["hidden_states"]


def attention_in_place(model):
    def hook(module, args, out):
        out[0].mul_(1.01)

    parts(model, 1)[0].register_forward_hook(hook)
    return model


def steering_in_place(model):
    block = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))[2]

    def hook(module, args, kwargs):
        stream_of(args, kwargs).add_(1e-5)

    block.register_forward_pre_hook(hook, with_kwargs=True)
    return model


def final_norm_in_place(model):
    norm = {"llama": "model.norm", "gpt2": "transformer.ln_f"}
    norm = norm.get(model.config.model_type, "gpt_neox.final_layer_norm")

    def hook(module, args):
        args[0].mul_(1.001)

    model.get_submodule(norm).register_forward_pre_hook(hook)
    return model


@pytest.mark.parametrize("heads", [False, True])
@pytest.mark.parametrize(
    ("change", "where"),
    [
        (attention_in_place, "attention of block 1 must return what its projection does"),
        (steering_in_place, "block 2 must get what block 1 returned"),
        (final_norm_in_place, r"\w*Norm must get what the last block returned"),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_changed_in_place_is_not_what_it_was(kind, change, where, heads):
    """The changed number and the one to compare it with lie in one memory."""
    model = change(tiny(kind, torch.float64))
    with pytest.raises(ValueError, match=f"{where}: got it changed in place"):
        gradient_components(model, IDS, heads=heads)


def detached_attention(model):
    parts(model, 2)[0].register_forward_hook(lambda m, args, out: (out[0].detach(), *out[1:]))
    return model


def detached_mlp(model):
    block = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))[1]
    block.mlp.register_forward_hook(lambda m, args, out: out.detach())
    return model


def detached_logits(model):
    model.get_output_embeddings().register_forward_hook(lambda m, args, out: out.detach())
    return model


@pytest.mark.parametrize("heads", [False, True])
@pytest.mark.parametrize(
    ("change", "where"),
    [
        (detached_attention, r"L2\.(attn|z)"),
        (detached_mlp, r"L1\.mlp"),
        (detached_logits, "the logits"),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_what_no_gradient_reaches_is_named(kind, change, where, heads):
    model = change(tiny(kind, torch.float64))
    before = hooks_of(model)
    with pytest.raises(ValueError, match=f"no gradient reaches {where}: something detaches it"):
        gradient_components(model, IDS, heads=heads)
    assert hooks_of(model) == before


def test_what_changes_padding_only_changes_nothing():
    batch = {"input_ids": IDS, "attention_mask": torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]])}
    model = block_hook(tiny("gpt2"))
    expected = gradient_components(tiny("gpt2"), batch)
    for name, part in gradient_components(model, batch).items():
        assert torch.equal(part, expected[name])


class Twice(torch.nn.Module):
    def forward(self, weight):
        return 2 * weight


def test_parametrized_projections_are_read_as_they_compute():
    for kind in KINDS:
        model = tiny(kind)
        expected = tiny(kind)
        with torch.no_grad():
            parts(expected, 1)[1].weight.mul_(2)
        torch.nn.utils.parametrize.register_parametrization(parts(model, 1)[1], "weight", Twice())
        model.eval()
        expected = gradient_components(expected, IDS, heads=True)
        for name, part in gradient_components(model, IDS, heads=True).items():
            torch.testing.assert_close(part, expected[name])


def test_inputs_changed_before_the_projection_are_what_heads_write_from():
    model, expected = tiny("llama"), tiny("llama")
    parts(model, 1)[1].register_forward_pre_hook(lambda m, args: (2 * args[0],))
    with torch.no_grad():
        parts(expected, 1)[0].v_proj.weight.mul_(2)
    expected = gradient_components(expected, IDS, heads=True, attribution=True)
    for name, part in gradient_components(model, IDS, heads=True, attribution=True).items():
        torch.testing.assert_close(part, expected[name])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounding_is_not_refused(kind, dtype):
    model = tiny(kind, dtype)
    ids = torch.randint(50, (8, 30), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        # sums that cancel: their rounding is large beside the result
        for layer in range(3):
            weight = parts(model, layer)[1].weight
            weight.sub_(weight.mean(0 if kind == "gpt2" else 1, keepdim=True)).mul_(4)
    assert gradient_components(model, ids, heads=True)


def test_heads_of_another_size_are_refused():
    model = tiny("gpt2")
    model.transformer.h[1].attn.head_dim = 12
    where = r"block 1 must read 4 heads \(config.num_attention_heads\) of 12 numbers, got 24 in"
    with pytest.raises(ValueError, match=where):
        gradient_components(model, IDS, heads=True)


def test_layers_that_run_twice_or_never_are_refused():
    model = tiny("llama")
    mlp = parts(model, 1)[2]
    inner = mlp.forward
    mlp.forward = lambda x: inner(x)
    gradient_components(model, IDS)
    block = model.model.layers[1]
    run = block.forward
    block.forward = lambda x, **rest: run(x, **rest) if mlp(x) is not None else None
    with pytest.raises(ValueError, match="block 1 runs its mlp more than once"):
        gradient_components(model, IDS)
    model = tiny("llama")
    model.model.layers[1].forward = lambda x, **rest: x
    with pytest.raises(ValueError, match=r"in block 1 hooks fire only on \['x'\]; code compiled"):
        gradient_components(model, IDS)


def test_dropout_in_a_part_of_the_model_is_refused():
    model = tiny("gpt2")
    model.transformer.h[1].attn.train()
    with pytest.raises(ValueError, match=r"call model.eval\(\)"):
        gradient_components(model, IDS)
