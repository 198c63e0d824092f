# SPDX-License-Identifier: Apache-2.0
"""Heads' results in real HookedTransformers: numbers, hooks, memory, removal."""

import contextlib
import copy
import functools
import types

import oracle
import pytest
import torch
from largest import Largest

from mikernels.integrations.handle import Handle
from mikernels.integrations.transformer_lens import fast_heads

with contextlib.suppress(ImportError):
    import einops

BATCH, TOKENS, LAYERS, HEADS, D_HEAD, D = 2, 7, 2, 4, 16, 64
PRODUCT = BATCH * TOKENS * HEADS * D_HEAD * D

peers = pytest.mark.peers
pytestmark = pytest.mark.filterwarnings("ignore:HookedTransformer is deprecated")


def make_model(**changes):
    lens = pytest.importorskip("transformer_lens", reason="transformer-lens is not installed")
    config = {
        "n_layers": LAYERS,
        "d_model": D,
        "n_ctx": 16,
        "d_head": D_HEAD,
        "n_heads": HEADS,
        "d_mlp": 2 * D,
        "d_vocab": 31,
        "act_fn": "gelu",
        "normalization_type": "LN",
        "seed": 0,
        "device": "cpu",
        "use_attn_result": True,
        "use_split_qkv_input": True,
        "use_hook_mlp_in": True,
    }
    model = lens.HookedTransformer(lens.HookedTransformerConfig(**(config | changes)))
    with torch.no_grad():
        for seed, parameter in enumerate(model.parameters()):  # biases start as zeros
            parameter.add_(0.1 * oracle.randn(*parameter.shape, dtype=parameter.dtype, seed=seed))
    return model


def in_double(model):
    exact = copy.deepcopy(model).double()
    exact.cfg.dtype = torch.float64
    return exact


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture
def tokens():
    return torch.randint(31, (BATCH, TOKENS), generator=torch.Generator().manual_seed(1))


def run(model, tokens, hooks=()):
    """Logits, heads' results, and the parameters' gradients in a row (that of b_K is rounding)."""
    model.zero_grad()
    results = []

    def keep(result, hook):
        results.append(result.detach().clone())

    every = [(f"blocks.{i}.attn.hook_result", keep) for i in range(LAYERS)]
    logits = model.run_with_hooks(tokens, fwd_hooks=[*every, *hooks])
    logits.float().pow(2).mean().backward()
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return {"logits": logits.detach(), "results": torch.stack(results), "d": torch.cat(gradients)}


@peers
@pytest.mark.parametrize("changes", [{}, {"n_key_value_heads": 2}], ids=["mha", "gqa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_and_gradients(tokens, changes, dtype):
    model = make_model(**changes, dtype=dtype)
    eager = run(model, tokens)
    exact = run(in_double(model), tokens)
    with fast_heads(model) as handle:
        fast = run(model, tokens)
    assert fast.keys() == eager.keys()
    assert handle.calls == LAYERS
    for name in fast:
        assert fast[name].dtype == eager[name].dtype
        oracle.assert_accurate(fast[name], exact[name], eager[name])


@peers
def test_hooks_fire_alike_and_edit(model, tokens):
    def ablate(result, hook):
        assert result.is_contiguous()
        result[:, :, 1] = 0
        return 2 * result

    edits = [("blocks.0.attn.hook_result", ablate)]
    plain, eager = run(model, tokens), run(model, tokens, edits)
    with fast_heads(model):
        fast = run(model, tokens, edits)
    assert not torch.allclose(eager["logits"], plain["logits"])
    exact = run(in_double(model), tokens, edits)
    for name in fast:
        oracle.assert_accurate(fast[name], exact[name], eager[name])

    with torch.no_grad():
        _, before = model.run_with_cache(tokens)
        with fast_heads(model):
            _, after = model.run_with_cache(tokens)
    assert list(after) == list(before)
    assert all(after[name].shape == before[name].shape for name in before)


@peers
def test_backward_hooks_of_results(model, tokens):
    def gradients():
        seen = {}

        def keep(gradient, hook):
            seen[hook.name] = gradient.clone()

        names = [
            f"blocks.{i}.{h}" for i in range(LAYERS) for h in ("attn.hook_result", "hook_k_input")
        ]
        with model.hooks(bwd_hooks=[(name, keep) for name in names]):
            model(tokens).pow(2).mean().backward()
        return seen

    eager = gradients()
    with fast_heads(model):
        fast = gradients()
    assert len(fast) == 2 * LAYERS and fast.keys() == eager.keys()
    for name in fast:
        torch.testing.assert_close(fast[name], eager[name])


@peers
def test_no_broadcast_product(model, tokens):
    with Largest() as eager:
        model(tokens).sum().backward()
    with fast_heads(model), Largest() as fast:
        model(tokens).sum().backward()
    assert eager.numel == PRODUCT
    assert fast.numel < PRODUCT / 4


@peers
def test_removal_restores_this_model_only(model, tokens):
    other = make_model()
    attention = model.blocks[0].attn
    before = {id(m): dict(vars(m)) for m in model.modules()}
    plain = run(model, tokens)
    handle = fast_heads(model)
    assert handle.replaced == LAYERS
    assert "forward" in vars(attention) and "forward" not in vars(other.blocks[0].attn)
    with Largest() as recorder:
        other(tokens)
    assert recorder.numel == PRODUCT and handle.calls == 0
    handle.remove()
    handle.remove()
    after = {id(m): dict(vars(m)) for m in model.modules()}
    assert {k: v.keys() for k, v in after.items()} == {k: v.keys() for k, v in before.items()}
    assert "forward" not in vars(attention)
    again = run(model, tokens)
    assert all(oracle.identical(again[name], plain[name]) for name in plain)


@peers
def test_removal_after_an_exception(model, tokens):
    def fail(result, hook):
        raise KeyError("in a hook")

    with pytest.raises(KeyError, match="in a hook"), fast_heads(model):
        model.run_with_hooks(tokens, fwd_hooks=[("blocks.1.attn.hook_result", fail)])
    assert "forward" not in vars(model.blocks[0].attn)
    model.reset_hooks()


@peers
def test_refusals(model, tokens):
    with pytest.raises(TypeError, match="must be a TransformerLens model, got Linear"):
        fast_heads(torch.nn.Linear(2, 2))
    off = make_model(use_attn_result=False, use_split_qkv_input=False)
    with pytest.raises(ValueError, match=r"2 attention modules and no .*set_use_attn_result"):
        fast_heads(off)
    with fast_heads(model) as handle:
        model(tokens)
        with pytest.raises(ValueError, match="a method of this module's own"):
            fast_heads(model)
        own = vars(model.blocks[0].attn)["forward"]
        model.blocks[0].attn.forward = lambda *args: None
        with pytest.raises(RuntimeError, match="expected its own forward in the Attention"):
            handle.remove()
        model.blocks[0].attn.forward = own
    unused = pytest.warns(RuntimeWarning, match="nothing that it replaces was computed")
    with unused, fast_heads(model):
        pass


def complex_attn_linear(input, w, b):
    """As 2.10 to 2.15 compute q, k and v of split inputs."""
    rows = einops.rearrange(input, "batch pos head_index d_model -> batch pos head_index d_model 1")
    columns = einops.rearrange(w, "head_index d_model d_head -> 1 1 head_index d_model d_head")
    return (rows * columns).sum(dim=-2) + b


class SplitAttention(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.hook_result = torch.nn.Identity()

    def calculate_qkv_matrices(self, x, w, b):
        return complex_attn_linear(x, w, b)


@peers
def test_split_inputs_of_older_versions():
    pytest.importorskip("einops", reason="einops is not installed")
    model = torch.nn.Sequential(SplitAttention())
    model.cfg = types.SimpleNamespace(use_split_qkv_input=True)
    x, w, b = (oracle.randn(*s) for s in ((2, 5, 3, 16), (3, 16, 8), (3, 8)))
    eager = model[0].calculate_qkv_matrices(x, w, b)
    exact = complex_attn_linear(x.double(), w.double(), b.double())
    with fast_heads(model) as handle, Largest() as recorder:
        fast = model[0].calculate_qkv_matrices(x, w, b)
    assert handle.calls == 1 and recorder.numel == x.numel()
    oracle.assert_accurate(fast, exact, eager)


def checker(function):
    """As jaxtyping's import hook wraps every function of a package."""
    jaxtyping = pytest.importorskip("jaxtyping", reason="jaxtyping is not installed")

    def typechecker(f):
        @functools.wraps(f)
        def checked(*args, **kwargs):
            return f(*args, **kwargs)

        checked.__code__ = checked.__code__.replace(co_filename="<@beartype(f) at 0x0>")
        return checked

    return jaxtyping.jaxtyped(typechecker=typechecker)(function)


@peers
def test_methods_under_a_type_checker(tokens, monkeypatch):
    model = make_model()
    kind = next(k for k in type(model.blocks[0].attn).__mro__ if "forward" in vars(k))
    eager, exact = run(model, tokens), run(in_double(model), tokens)
    wrapped = checker(kind.forward)
    assert hasattr(wrapped, "__wrapped__") and not hasattr(kind.forward, "__wrapped__")
    monkeypatch.setattr(kind, "forward", wrapped)
    with fast_heads(model) as handle:
        fast = run(model, tokens)
    assert handle.calls == LAYERS
    for name in fast:
        oracle.assert_accurate(fast[name], exact[name], eager[name])


@peers
def test_methods_under_wrappers_that_may_compute_are_refused(model, monkeypatch):
    kind = next(k for k in type(model.blocks[0].attn).__mro__ if "forward" in vars(k))
    forward = kind.forward

    @functools.wraps(forward)
    def doubled(*args, **kwargs):
        return 2 * forward(*args, **kwargs)

    monkeypatch.setattr(kind, "forward", doubled)
    with pytest.raises(
        ValueError, match=r"remove what wraps its forward \(.*test_transformer_lens"
    ):
        fast_heads(model)


@peers
def test_subclasses_that_compute_more_are_refused():
    model = make_model()
    kind = type(model.blocks[0].attn)

    class Doubled(kind):
        def forward(self, *args, **kwargs):
            return 2 * super().forward(*args, **kwargs)

    for block in model.blocks:
        block.attn.__class__ = Doubled
    with pytest.raises(ValueError, match="2 attention modules and no such product"):
        fast_heads(model)


@peers
def test_compiled_models_are_refused():
    model = make_model()
    model.blocks[1].attn.compile(backend="eager")
    with pytest.raises(
        ValueError, match=r"fast_heads: .* got compiled blocks.1.attn \(Attention\)"
    ):
        fast_heads(model)
    with pytest.raises(ValueError, match="fast_heads: .* got compiled OptimizedModule; give"):
        fast_heads(torch.compile(make_model(), backend="eager"))


def test_batched_products_are_left_alone():
    """As of TransformerBridge."""

    class Attention(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.hook_result = torch.nn.Identity()

        def forward(self, z, w):
            return self.hook_result(torch.einsum("bthe,hed->bthd", z, w)).sum(2)

    bridge = torch.nn.Sequential(Attention())
    bridge.cfg = types.SimpleNamespace(use_attn_result=True)
    with pytest.raises(ValueError, match="leave out fast_heads"):
        fast_heads(bridge)


def test_handle_restores_what_was_there():
    first, second = torch.nn.Identity(), torch.nn.Identity()
    first.forward = mine = lambda x: x
    order = []
    handle = Handle("test")
    handle.replace(first, "forward", None)
    handle.replace(second, "forward", None)
    handle.on_remove(lambda: order.append("undone"))
    assert handle.replaced == 2
    handle.remove()
    assert vars(first)["forward"] is mine and "forward" not in vars(second)
    assert order == ["undone"]
