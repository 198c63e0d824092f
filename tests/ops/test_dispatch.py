# SPDX-License-Identifier: Apache-2.0
"""What every operator owes the dispatcher: schema, fake, implementations, errors, compilation."""

import re
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from one_level import one_impl
from op_samples import LAYOUTS, SAMPLES, D, F, K
from oracle import DTYPES, randn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import mikernels
from mikernels import SparseCodes, _crossover, _ext, _triton, row_topk, sparse_decode, topk_encode
from mikernels._dispatch import OPS, Op


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
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    # two thirds of the time; what is traced hangs on layouts and sizes alone
    if dtype == torch.float32:
        checks.append("test_aot_dispatch_dynamic")
    for arguments in SAMPLES[name](LAYOUTS[layout], n, dtype):
        torch.library.opcheck(OPS[name].default, arguments, test_utils=checks)


# results -> axes whose size hangs on the data
DYNAMIC = {"threshold_encode": {0: (0,), 1: (0,)}}


@one_impl
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", SAMPLES)
def test_fakes_have_the_strides_of_the_implementation(impl, name, layout):
    for arguments in SAMPLES[name](LAYOUTS[layout], 5, torch.float32):
        real = OPS[name](*arguments, impl=impl)
        with FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv()) as mode:
            fakes = [
                mode.from_tensor(a, static_shapes=True) if isinstance(a, torch.Tensor) else a
                for a in arguments
            ]
            fake = OPS[name].default(*fakes)
        real, fake = (r if isinstance(r, tuple) else (r,) for r in (real, fake))
        for place, (a, b) in enumerate(zip(real, fake, strict=True)):
            assert (a is None) == (b is None)
            if a is not None:
                for axis in DYNAMIC.get(name, {}).get(place, ()):
                    assert isinstance(b.shape[axis], torch.SymInt)
                    a, b = a.narrow(axis, 0, 0), b.narrow(axis, 0, 0)
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
    monkeypatch.setattr(Op, "state", lambda self, name: "no compiler")
    with pytest.raises(RuntimeError, match="impl='cpp' is not available: no compiler"):
        row_topk(scores, 2, impl="cpp")
    monkeypatch.setenv("MIKERNELS_IMPL", "cpp")
    with pytest.raises(RuntimeError, match="impl='cpp' is not available: no compiler"):
        row_topk(scores, 2)
    assert row_topk(scores, 2, impl="reference")[0].shape == (3, 2)


def recorder(op, monkeypatch):
    """What `op` leads to from here on: the names of what it runs, in order."""
    ran = []

    def seen(name, run):
        return lambda *args, **kwargs: ran.append(name) or run(*args, **kwargs)

    monkeypatch.setattr(op, "default", seen("default", op.default))
    monkeypatch.setattr(op, "reference", seen("reference", op.reference))
    if op._dense is not None:
        watched = _crossover.Dense(op._dense.key, op._dense.run, op._dense.sizes)
        object.__setattr__(watched, "run", seen("dense", op._dense.run))
        monkeypatch.setattr(op, "_dense", watched)
    return ran


def test_the_environment_chooses_the_implementation(monkeypatch):
    op, scores = OPS["row_topk"], randn(3, 9)
    monkeypatch.setenv("MIKERNELS_IMPL", "reference")
    assert op.resolve(None, scores.device) == "reference"
    assert op.resolve("auto", scores.device) == "auto"
    ran = recorder(op, monkeypatch)
    op(scores, 2, False)
    op(scores, 2, False, impl="auto")
    row_topk(scores, 2)
    assert ran == ["reference", "default", "reference"]
    monkeypatch.setenv("MIKERNELS_IMPL", "")
    assert op.resolve(None, scores.device) == "auto"
    monkeypatch.setenv("MIKERNELS_IMPL", "fastest")
    with pytest.raises(ValueError, match="row_topk: impl must be one of .*got 'fastest'"):
        op(scores, 2, False)


@pytest.mark.parametrize("name", SAMPLES)
def test_an_operator_named_an_implementation_runs_it_or_raises(name):
    """Also one whose caller resolved the name for another operator: its forward's, say."""
    op, arguments = OPS[name], next(iter(SAMPLES[name](LAYOUTS["dense"], 5, torch.float32)))
    meta = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in arguments]
    if _ext.C is not None:
        with pytest.raises(RuntimeError, match=f"{name}: impl='cpp' runs on cpu tensors"):
            op(*meta, impl="cpp")
    with pytest.raises(
        RuntimeError, match=f"{name}: impl='cuda' (is not available: |runs on cuda)"
    ):
        op(*arguments, impl="cuda")
    with pytest.raises(ValueError, match=f"{name}: impl must be one of .*got 'best'"):
        op(*arguments, impl="best")


def test_a_named_implementation_that_is_not_there_raises_in_the_backward_too(monkeypatch):
    """Not the reference instead, without a word."""
    codes = SparseCodes(randn(5, K).requires_grad_(), torch.tensor([[0, 1, 2]] * 5), F)
    y = sparse_decode(codes, randn(F, D), impl="cpp" if _ext.C is not None else "reference")
    if _ext.C is None:
        pytest.skip(_ext.MISSING)
    monkeypatch.setattr(OPS["gather_dot"], "_has_cpp", False)
    with pytest.raises(RuntimeError, match="gather_dot: impl='cpp' is not available: not written"):
        y.sum().backward()


@pytest.mark.parametrize("built", [False, True])
@pytest.mark.parametrize("launches", [False, True])
def test_the_owner_of_the_cuda_key(monkeypatch, built, launches):
    """CUDA C++ where it was built for the device, else Triton, else the reference; fp64 that."""
    op, ran = OPS["row_topk"], []
    for name in ("_cuda_op", "_triton", "reference"):
        monkeypatch.setattr(op, name, lambda *args, name=name: ran.append(name))
    monkeypatch.setattr(_ext, "cuda_unsupported", lambda device: "" if built else "other code")
    monkeypatch.setattr(_triton, "unsupported", lambda device: "" if launches else "too old")
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    op._on_device(randn(3, 9), 2, False)
    op._on_device(randn(3, 9, dtype=torch.float64), 2, False)
    assert ran == ["_cuda_op" if built else "_triton" if launches else "reference", "reference"]
    monkeypatch.setattr(op, "_cuda_op", None)
    op._on_device(randn(3, 9), 2, False)
    assert ran[2:] == ["_triton" if launches else "reference"]


def test_what_was_built_for_other_devices_is_not_available(monkeypatch):
    if not hasattr(torch.ops.mikernels, "cuda_runs"):
        pytest.skip(_ext.cuda_missing())
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert torch.ops.mikernels.cuda_runs(0) is False
    monkeypatch.setattr(_ext, "_runs_on", _ext._runs_on.__wrapped__)
    reason = _ext.cuda_unsupported(torch.device("cuda", 0))
    assert reason.startswith("has no code for cuda:0, it was built for ")
    assert _ext.build_facts()["cuda"]["archs"][0] in reason


def test_compile_of_a_named_implementation(impl):
    x, w = randn(5, D), randn(200, D)
    compiled = torch.compile(
        lambda x: topk_encode(x, w, k=K, impl=impl).values, fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(x), topk_encode(x, w, k=K, impl=impl).values)


DENSE = {name for name, op in OPS.items() if op._dense is not None}


def test_the_operators_with_a_dense_alternative():
    assert {"encode", "decode", "decode_error"} == DENSE
    assert {OPS[name]._dense.key for name in DENSE} == {"encode", "decode"}


@pytest.mark.parametrize("name", sorted(DENSE))
def test_auto_alone_goes_dense_and_by_the_table(monkeypatch, name):
    op, asked = OPS[name], []
    arguments = next(iter(SAMPLES[name](LAYOUTS["dense"], 5, torch.float32)))
    ran = recorder(op, monkeypatch)

    def wins(*sizes):
        asked.append(sizes)
        return len(asked) > 1

    monkeypatch.setattr(_crossover, "sparse_wins", wins)
    dense, sparse = op(*arguments), op(*arguments)
    assert ran == ["dense", "default"]
    key = op._dense.key, torch.device("cpu"), torch.float32, D, F, K
    assert asked == [key, key]
    for a, b in zip(*(r if isinstance(r, tuple) else (r,) for r in (dense, sparse)), strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
        torch.testing.assert_close(a, b)
    monkeypatch.setattr(_crossover, "sparse_wins", lambda *sizes: False)
    op(*arguments, dense=False)
    op(*arguments, impl="reference")
    monkeypatch.setenv("MIKERNELS_IMPL", "reference")
    op(*arguments)
    if _ext.C is not None:
        op(*arguments, impl="cpp")
    assert ran[2:] == ["default", "reference", "reference", *["default"] * (_ext.C is not None)]


def test_slots_of_ragged_codes_are_their_mean(monkeypatch):
    asked = []
    monkeypatch.setattr(_crossover, "sparse_wins", lambda *sizes: asked.append(sizes[-1]) or True)
    w = randn(F, D)
    for bounds, slots in (([0, 1, 7], 4), ([0, 2, 6], 3), ([0], 0), ([0, 0, 0], 0)):
        s = bounds[-1]
        codes = randn(s), torch.arange(s), torch.tensor(bounds)
        OPS["decode"](*codes, w, None)
        assert asked.pop() == slots


def test_a_dense_alternative_keeps_its_dtype_under_autocast(monkeypatch):
    monkeypatch.setattr(_crossover, "sparse_wins", lambda *sizes: False)
    op = OPS["encode"]
    arguments = randn(5, D), randn(F, D, seed=1), None, None, None, K, True
    expected = op(*arguments)
    with torch.autocast("cpu", torch.bfloat16):
        found = op(*arguments)
    assert all(map(torch.equal, found, expected))


def test_gradients_do_not_go_dense(monkeypatch):
    """An encoder's input gradient keeps its bits whatever the table says."""
    x = randn(5, D).requires_grad_()
    codes = topk_encode(x, randn(F, D), k=K)
    ran = recorder(OPS["decode"], monkeypatch)
    monkeypatch.setattr(_crossover, "sparse_wins", lambda *sizes: False)
    codes.values.sum().backward()
    assert ran == ["default"]


def test_implementations_made_of_others_do_not_ask_the_environment(monkeypatch):
    """The name was resolved outside: an inner operator runs as registered."""
    monkeypatch.setattr(_crossover, "sparse_wins", lambda *sizes: False)
    for name in ("sae_update_", "encode"):
        arguments = next(iter(SAMPLES[name](LAYOUTS["dense"], 5, torch.float32)))
        with monkeypatch.context() as patch:
            patch.setenv("MIKERNELS_IMPL", "cuda")
            OPS[name](*arguments, impl="auto")


toys = iter(range(100))


def toy(**more):
    """`toy<i>(x) = 2 x`, registered."""
    return Op(
        f"toy{next(toys)}(Tensor x) -> Tensor",
        lambda x: x * 2,
        lambda x: x.new_empty(x.shape),
        operands={"x": "T[N]"},
        **more,
    )


@pytest.fixture
def operators(monkeypatch):
    """Operators that a test registers are not in the list of the others."""
    monkeypatch.setattr("mikernels._dispatch.OPS", dict(OPS))


def test_a_cpu_implementation_by_argument(operators, monkeypatch):
    x, seen = torch.arange(3.0), []

    def on_cpu(x):
        seen.append(torch.is_autocast_enabled("cpu"))
        return x + x

    monkeypatch.setattr(_ext, "C", object())
    op = toy(cpu=on_cpu)
    assert op.backends()["cpp"] == "ready"
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(op(x), x * 2) and torch.equal(op(x, impl="cpp"), x * 2)
    assert torch.equal(op(x, impl="reference"), x * 2)
    assert seen == [False, False]
    with pytest.raises(ValueError, match=f"{op.name}: x must be T"):
        op(x[None], impl="cpp")
    # without the extension there is nothing that it could be made of
    monkeypatch.setattr(_ext, "C", None)
    monkeypatch.setattr(_ext, "MISSING", "no compiler")
    op = toy(cpu=on_cpu)
    assert op.backends()["cpp"] == "no compiler"
    assert torch.equal(op(x), x * 2) and len(seen) == 2


def test_importing_the_operators_registers_those_of_the_files(run_python):
    """Neither one less, for want of an import, nor one from elsewhere."""
    folder = Path(mikernels.__file__).parent / "ops"
    sources = [path.read_text() for path in folder.rglob("*.py")]
    names = sorted(n for text in sources for n in re.findall(r"= Op\(\s*\"(\w+)\(", text))
    assert len(names) > 15 and len(set(names)) == len(names)
    seen = run_python(
        """
        import mikernels.ops, torch
        from mikernels._dispatch import OPS
        defined = [n for n in torch._C._dispatch_get_all_op_names() if n.startswith("mikernels::")]
        # those of CUDA C++, and Triton's beside them; and what the extension says of itself
        apart = ("_cuda", "_triton", "::cuda_runs", "::cpu_level", "::cpu_supports")
        apart += ("::set_cpu_level", "::screened_pairs", "::measure_peaks")
        print(sorted(OPS), sorted(n[11:] for n in defined if not n.endswith(apart)), sep=";")
        """
    )
    assert seen.strip() == f"{names};{names}"
