# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from attention_cases import check_gradients, may_attend, operands
from one_level import one_impl
from oracle import DTYPES, far_and_near, identical, num_threads, randn

from mikernels import attention_gradients

NAN, INF = float("nan"), float("inf")
F32 = torch.finfo(torch.float32)


def masks(kind, b, h, t, s, dtype=torch.float32):
    """A quarter of the pairs masked, some queries without a key."""
    keep = randn(b, h, t, s, seed=8) > -0.7
    if t > 1:
        keep[:, :, t // 2] = False
    if kind == "keep":
        return {"keep": keep}
    bias = randn(b, h, t, s, dtype=dtype, seed=9)
    return {"bias": bias.masked_fill(~keep, torch.finfo(dtype).min if kind == "least" else -INF)}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape, options",
    [
        ((1, 1, 1, 1, 1, 1, 1), {}),
        ((2, 2, 1, 3, 70, 5, 19), {"temperature": 2.0}),
        # two parts, two blocks of each head, three chunks of keys, two of e
        ((1, 4, 1, 66, 130, 20, 9), {"temperature": 2.0}),
        ((1, 1, 1, 5, 9, 140, 3), {"temperature": 2.0}),
        ((1, 2, 2, 130, 130, 17, 65), {"causal": True}),
        ((1, 2, 2, 70, 200, 16, 16), {"causal": True, "window": 9, "temperature": 3.0}),
        ((1, 2, 1, 140, 70, 16, 20), {"window": 66, "temperature": 2.0}),
        ((1, 4, 2, 65, 65, 12, 8), {"softcap": 3.0, "causal": True, "temperature": 2.0}),
        ((1, 2, 2, 33, 90, 8, 8), {"scale": 40.0, "softcap": 30.0, "temperature": 0.7}),
        # scores that the cap hardly changes: a tanh of 0.001 times 1000
        ((1, 2, 2, 33, 90, 8, 8), {"softcap": 1000.0}),
        # sharp: exponentials that underflow
        ((1, 2, 2, 66, 90, 8, 8), {"scale": 40.0, "temperature": 2.0}),
    ],
    ids=str,
)
def test_attention_gradients_accuracy(impl, dtype, shape, options):
    check_gradients(impl, *operands(*shape, dtype), **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["keep", "bias", "least"])
def test_attention_gradients_masks(impl, dtype, kind):
    tensors = operands(2, 2, 1, 70, 133, 8, 12, dtype)
    mask = masks(kind, 2, 2, 70, 133)
    check_gradients(impl, *tensors, **mask)
    broadcast = {name: m[:1, :, :1] for name, m in mask.items()}
    check_gradients(impl, *tensors, **broadcast, causal=True, temperature=2.0)
    both = {**masks("keep", 2, 1, 70, 133), **masks("bias", 1, 2, 1, 133, torch.float16)}
    found = check_gradients(impl, *tensors, **both, softcap=2.0, window=40)
    empty = ~may_attend((2, 2, 70, 133), **both, window=40).any(-1)
    assert empty.any() and not empty.all()
    # nothing attended to: no output, so only what was claimed to be one is left
    assert not found[0][empty].any() and not found[3][empty][:, 1:].any()


@pytest.mark.parametrize("masked", ["keep", "bias", "least", "chunks"])
def test_attention_gradients_of_queries_without_keys(impl, masked):
    tensors = operands(1, 2, 2, 5, 130, 4, 4)
    if masked == "chunks":
        # whole chunks that nobody attends to, before, between and after
        keep = torch.zeros(130, dtype=torch.bool)
        keep[70:75] = True
        check_gradients(impl, *tensors, keep=keep[None, None, None])
        found = check_gradients(impl, *(t[:, :, 1:] for t in tensors[:2]),
                                *tensors[2:4], tensors[4][:, :, 1:], keep=~keep[None, None, None],
                                causal=True)  # fmt: skip
        return
    fill = torch.finfo(torch.float32).min if masked == "least" else -INF
    mask = (
        {"keep": torch.zeros(1, 1, 1, 130, dtype=torch.bool)}
        if masked == "keep"
        else {"bias": torch.full((1, 1, 1, 130), fill)}
    )
    found = check_gradients(impl, *tensors, **mask)
    # the least number is no mask: all keys are as far away
    assert all(bool(t.any()) == (masked == "least") for t in found[:3])


def test_attention_gradients_are_those_of_autograd(impl):
    grad, q, k, v, out = operands(2, 4, 2, 70, 90, 8, 12, torch.float64)
    keep = randn(2, 1, 70, 90, seed=5) > -0.5

    def attend(q, k, v, scale, softcap):
        k, v = (t.repeat_interleave(2, 1) for t in (k, v))
        s = scale * (q @ k.mT)
        s = softcap * (s / softcap).tanh()
        return torch.softmax(s.masked_fill(~keep, -INF), -1) @ v

    leaves = [t.requires_grad_() for t in (q, k, v)]
    out = attend(*leaves, 0.3, 5.0)
    plain = torch.autograd.grad(out, leaves, grad)
    # GIM by two passes: dV from the true pattern, dQ and dK from that at scores S / temperature,
    # whose derivative has the factor 1 / temperature that the rule leaves out
    tempered = torch.autograd.grad(attend(*leaves, 0.3 / 2, 5.0 / 2), leaves, grad)
    by_rule = 2 * tempered[0], 2 * tempered[1], plain[2]
    for temperature, wanted in ((1.0, plain), (2.0, by_rule)):
        found = attention_gradients(grad, q, k, v, out, keep=keep, scale=0.3, softcap=5.0,
                                    temperature=temperature, impl=impl)  # fmt: skip
        for one, other in zip(found[:3], wanted, strict=True):
            torch.testing.assert_close(one, other)
        checks = found[3]
        # the output is the output, to rounding
        assert (
            checks[..., 0].max()
            < 1e-14
            < attention_gradients(
                grad, q, k, v, 1.001 * out, keep=keep, scale=0.3, softcap=5.0, impl=impl
            )[3][..., 0].min()
        )
        assert checks[..., 2].any() == (temperature != 1)


@one_impl
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_gradients_layouts(impl, dtype):
    b, h, g, t, s, e, f = 2, 4, 2, 9, 70, 20, 12
    tensors = operands(b, h, g, t, s, e, f, dtype)
    mask = {**masks("keep", b, 1, t, s), **masks("bias", 1, h, t, s, torch.bfloat16)}
    options = {"temperature": 2.0, "softcap": 4.0, "impl": impl}
    wanted = attention_gradients(*tensors, **mask, **options)

    def hugging_face(x):
        return x.transpose(1, 2).contiguous().transpose(1, 2)

    def backwards(x):
        return x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)

    def spread(x):
        return torch.stack([x, x], -1)[..., 1]

    for layout in (hugging_face, backwards, spread):
        found = attention_gradients(
            *map(layout, tensors), **{k: layout(m) for k, m in mask.items()}, **options
        )
        assert all(identical(x, y) for x, y in zip(found, wanted, strict=True))
        assert all(x.is_contiguous() for x in found)
    # expanded along every axis that can be
    grad, q, k, v, out = tensors
    for axis in range(4):
        narrow = [x.narrow(axis, 0, 1).expand(x.shape) for x in tensors]
        wide = {name: m.narrow(axis % 3, 0, 1).expand(m.shape) for name, m in mask.items()}
        pairs = zip(
            attention_gradients(*narrow, **wide, **options),
            attention_gradients(
                *(x.contiguous() for x in narrow),
                **{name: m.contiguous() for name, m in wide.items()}, **options,
            ),
            strict=True,
        )  # fmt: skip
        assert all(identical(x, y) for x, y in pairs)


@one_impl
@pytest.mark.parametrize("axis", range(4))
def test_attention_gradients_of_rows_far_apart(impl, axis):
    far, near = (
        attention_gradients(
            *[t] * 5,
            keep=t[..., : t.shape[2]] > -1 if axis < 3 else None,
            bias=t[..., : t.shape[2]] if axis < 3 else None,
            impl=impl,
        )
        for t in far_and_near("cpu", 3, axis)
    )
    assert all(identical(x, y) for x, y in zip(far, near, strict=True))


@pytest.mark.parametrize("zero", range(7))
def test_attention_gradients_empty(impl, zero):
    shape = [2, 4, 2, 5, 6, 7, 8]
    shape[zero] = 0
    if zero == 2:
        with pytest.raises(ValueError, match="k must have heads of which H is a multiple, got 0"):
            attention_gradients(*operands(*shape), impl=impl)
        return
    tensors = operands(*shape)
    grad, q, k, v, out = tensors
    dq, dk, dv, checks = attention_gradients(*tensors, scale=0.5, temperature=2.0, impl=impl)
    assert checks.shape == (*q.shape[:3], 4)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    k, v = (x.repeat_interleave(2, 1) for x in (k, v))
    if zero == 1:
        k, v = k[:, :0], v[:, :0]
    y = torch.softmax(0.5 * q @ k.mT, -1) @ v
    plain = torch.autograd.grad(y, leaves, grad, allow_unused=True)
    for found, leaf, wanted in zip((dq, dk, dv), leaves, plain, strict=True):
        assert found.shape == leaf.shape
        # S = 0 or f = 0 leave nothing, e = 0 leaves the mean of the values
        wanted = torch.zeros_like(leaf) if wanted is None else wanted
        if zero == 5 or not wanted.any():
            torch.testing.assert_close(found, wanted)
    if zero in (4, 6):
        assert not checks.any()


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("place", range(5))
def test_attention_gradients_non_finite(impl, place, value):
    """Where nothing is masked, what is not finite is where the definition has it. A masked pair may
    carry it on (0 times NaN is NaN) or not (where it is left out); an attended one does."""
    tensors = operands(1, 4, 2, 70, 130, 8, 12)
    tensors[place][0, 1, 67, 3] = value
    for causal in (False, True):
        options = {"causal": causal, "temperature": 2.0}
        found = attention_gradients(*tensors, **options, impl=impl)
        most = attention_gradients(*tensors, **options, impl="reference")
        for one, other in zip(found, most, strict=True):
            if causal:
                assert (one.isfinite() | ~other.isfinite()).all()
            else:
                assert torch.equal(one.isnan(), other.isnan())
                assert torch.equal(one.isinf(), other.isinf())
        heads = [1] if place in (0, 1, 4) else [2, 3]
        # of grad, q, k, v: dQ; of out: what was claimed is wrong
        met = found[0][0, heads, 67] if place < 4 else found[3][0, heads, 67, :1]
        assert not met.isfinite().all(-1).any()


@one_impl
def test_attention_gradients_do_not_depend_on_threads(impl):
    tensors = operands(1, 4, 1, 300, 2000, 16, 16)
    # of five parts the first is the last to be ready: the others meet a chunk of keys
    keep = torch.ones(1, 4, 1, 2000, dtype=torch.bool)
    keep[:, 1:, :, 5:] = False
    options = {"keep": keep, "temperature": 2.0, "impl": impl}
    with num_threads(1):
        first = attention_gradients(*tensors, **options)
    for threads in (2, 3, 3):
        with num_threads(threads):
            again = attention_gradients(*tensors, **options)
        assert all(identical(x, y) for x, y in zip(again, first, strict=True))


def test_attention_gradients_are_no_part_of_a_graph():
    tensors = [t.requires_grad_() for t in operands(1, 2, 1, 3, 4, 5, 6)]
    bias = randn(1, 1, 1, 4).requires_grad_()
    assert not any(t.requires_grad for t in attention_gradients(*tensors, bias=bias))


def test_attention_gradients_compile():
    tensors = operands(1, 2, 1, 3, 4, 5, 6)

    def function(*tensors):
        return attention_gradients(*tensors, causal=True, temperature=2.0)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for one, other in zip(compiled(*tensors), function(*tensors), strict=True):
        assert identical(one, other)
    found = attention_gradients(*(t.half().to("meta") for t in tensors))
    assert [t.shape for t in found[:3]] == [t.shape for t in tensors[1:4]]
    assert found[0].dtype == torch.float16 and found[3].dtype == torch.float32


T = operands(1, 4, 2, 3, 5, 6, 7)


def replaced(**changes):
    names = "grad", "q", "k", "v", "out"
    return [changes.get(name, t) for name, t in zip(names, T, strict=True)]


@pytest.mark.parametrize(
    "tensors, options, error, message",
    [
        (replaced(q=T[1][0]), {}, ValueError, r"q, k and v must be \[B, H, T, e\], .*got \[4, 3"),
        (replaced(q=T[1][:, :3]), {}, ValueError, "heads of which H is a multiple, got 2 for 3"),
        (replaced(k=T[2].half()), {}, TypeError, "k must have the dtype of grad"),
        (replaced(v=T[3].to("meta")), {}, ValueError, r"v must be on the device of grad \(cpu\)"),
        (T, {"softcap": -1.0}, ValueError, "softcap must be a finite number, 0 for none, got -1"),
        (T, {"softcap": INF}, ValueError, "softcap must be a finite number, .* got inf"),
        (T, {"temperature": 0.0}, ValueError, "temperature must be positive and finite, got 0"),
        (T, {"temperature": NAN}, ValueError, "temperature must be positive and finite, got nan"),
        (T, {"impl": "fast"}, ValueError, "impl must be one of .*, got 'fast'"),
    ],
)
def test_attention_gradients_errors(tensors, options, error, message):
    with pytest.raises(error, match=f"attention_gradients: .*{message}"):
        attention_gradients(*tensors, **options)
