# SPDX-License-Identifier: Apache-2.0
"""What every operator owes the dispatcher: schema, fake, implementations, errors, compilation."""

import pytest
import torch
from one_level import one_impl
from op_samples import LAYOUTS, SAMPLES, D, F, K
from oracle import DTYPES, randn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

import mikernels
from mikernels import SparseCodes, _ext, row_topk, sparse_decode, topk_encode
from mikernels._dispatch import OPS, Op, resolve_impl


def test_every_operator_has_samples():
    assert set(OPS) == set(SAMPLES)


@pytest.mark.parametrize(
    "layout, n, dtype",
    [
        *(("dense", 5, dtype) for dtype in DTYPES),
        *((layout, 5, torch.float32) for layout in LAYOUTS if layout != "dense"),
        *(("dense", 0, dtype) for dtype in (torch.float32, torch.bfloat16)),
    ],
)
@pytest.mark.parametrize("name", SAMPLES)
def test_opcheck(name, layout, n, dtype):
    for arguments in SAMPLES[name](LAYOUTS[layout], n, dtype):
        torch.library.opcheck(OPS[name].default, arguments)


@one_impl
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", SAMPLES)
def test_fakes_have_the_strides_of_the_implementation(impl, name, layout):
    for arguments in SAMPLES[name](LAYOUTS[layout], 5, torch.float32):
        real = OPS[name](*arguments, impl=impl)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fakes = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments]
            fake = OPS[name].default(*fakes)
        real, fake = (r if isinstance(r, tuple) else (r,) for r in (real, fake))
        for a, b in zip(real, fake, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                described = [(t.shape, t.dtype, t.stride(), t.device.type) for t in (a, b)]
                assert described[0] == described[1]


def test_functions_take_meta_tensors():
    x, w, b = (torch.empty(shape, device="meta") for shape in ((2, 5, D), (F, D), (F,)))
    codes = topk_encode(x, w, b, k=2)
    assert codes.values.is_meta and codes.indices.is_meta and codes.values.shape == (2, 5, 2)
    assert sparse_decode(codes, w, prefixes=[3, F]).shape == (2, 2, 5, D)
    assert row_topk(x, 2)[1].shape == (2, 5, 2)


def step(x, w_enc, b_enc, w_dec, b_dec, k):
    codes = topk_encode(x, w_enc, b_enc, k=k, b_dec=b_dec)
    return (sparse_decode(codes, w_dec, b_dec) - x).square().mean(), codes.fired()


def parameters():
    shapes = ((200, D), (200,), (200, D), (D,))
    return [randn(*s, seed=i).requires_grad_() for i, s in enumerate(shapes, 1)]


# inductor compiles C++ for seconds: once for the whole step, forward and backward, dynamic in N
def test_compile_of_the_sae_step():
    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    for n in (7, 12, 33):
        results = []
        for function in (step, compiled):
            leaves = parameters()
            loss, fired = function(randn(n, D), *leaves, 4)
            loss.backward()
            results.append([loss.detach(), fired, *(p.grad for p in leaves)])
        for eager, graph in zip(*results, strict=True):
            torch.testing.assert_close(graph, eager)


def test_compile_follows_k_and_shapes_without_recompiling():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    for n, k in ((7, 4), (12, 3), (33, 5)):
        leaves = parameters()
        loss, fired = compiled(randn(n, D), *leaves, k)
        expected = step(randn(n, D), *leaves, k)
        torch.testing.assert_close(loss, expected[0])
        assert torch.equal(fired, expected[1])
    assert counter.frame_count <= 2


def test_compile_of_row_topk_and_prefixes():
    def function(scores, values, w):
        best, indices = row_topk(scores, K, sorted=True)
        codes = SparseCodes(values * best, indices, F)
        return sparse_decode(codes, w, prefixes=[4, F]).square().sum()

    arguments = [randn(*s, seed=i).requires_grad_() for i, s in enumerate(((5, F), (5, K), (F, D)))]
    expected = torch.autograd.grad(function(*arguments), arguments)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for a, b in zip(torch.autograd.grad(compiled(*arguments), arguments), expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", SAMPLES)
def test_the_default_is_the_extension_where_there_is_one(name):
    backends = OPS[name].backends()
    assert backends["reference"] == "ready"
    if _ext.C is not None:
        assert backends["cpp"] == "ready"
    for state in backends.values():
        assert state, "an absent backend says why"


def test_the_extension_loads_if_it_was_built(run_python):
    assert (_ext.C is not None) == _ext.build_facts()["extension"], _ext.MISSING
    levels = mikernels.supported_levels()
    assert list(levels) == sorted(levels, key=_ext.LEVELS.index)
    # also for someone who has not imported torch before; the best level is the default
    seen = run_python(
        "import mikernels; print(mikernels.supported_levels(), mikernels.cpu_level())"
    )
    assert seen.strip() == f"{levels} {levels[-1] if levels else None}"


def test_force_level_selects_and_restores(level):
    assert mikernels.cpu_level() == level
    with pytest.raises(ZeroDivisionError), mikernels.force_level("portable"):
        assert mikernels.cpu_level() == "portable"
        raise ZeroDivisionError
    assert mikernels.cpu_level() == level


def test_force_level_of_an_unknown_level_raises():
    message = "got 'avx9000'" if _ext.C is not None else "no compiled extension"
    with pytest.raises(ValueError, match=message), mikernels.force_level("avx9000"):
        pass


def test_impl_is_named_or_raises(monkeypatch):
    scores = randn(3, 9)
    with pytest.raises(ValueError, match=r"row_topk: impl must be one of \['auto', 'cpp'.*'triton"):
        row_topk(scores, 2, impl="tritonn")
    with pytest.raises(RuntimeError, match="row_topk: impl='cpp' runs on cpu tensors, got meta"):
        row_topk(scores.to("meta"), 2, impl="cpp")
    monkeypatch.setattr(Op, "backends", lambda self: {"reference": "ready", "cpp": "no compiler"})
    with pytest.raises(RuntimeError, match="impl='cpp' is not available: no compiler"):
        row_topk(scores, 2, impl="cpp")
    monkeypatch.setenv("MIKERNELS_IMPL", "cpp")
    with pytest.raises(RuntimeError, match="impl='cpp' is not available: no compiler"):
        row_topk(scores, 2)
    assert row_topk(scores, 2, impl="reference")[0].shape == (3, 2)


def test_the_environment_chooses_the_implementation(monkeypatch):
    monkeypatch.setenv("MIKERNELS_IMPL", "reference")
    assert resolve_impl(OPS["row_topk"], None, torch.device("cpu")) == "reference"
    monkeypatch.delenv("MIKERNELS_IMPL")
    assert resolve_impl(OPS["row_topk"], None, torch.device("cpu")) == "auto"
