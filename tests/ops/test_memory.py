# SPDX-License-Identifier: Apache-2.0
"""Operators that write: autograd is told, and memory is never shared."""

import pytest
import torch
from one_level import one_impl
from op_samples import LAYOUTS, SAMPLES, copies
from oracle import randint, randn
from torch._subclasses.fake_tensor import FakeTensorMode

import mikernels as mk
from mikernels._dispatch import OPS
from mikernels._memory import overlap, overlaps_itself
from mikernels.optim import RowAdam

WRITERS = [name for name, op in OPS.items() if op.written]
# how an operator is called: through the registry or by torch, on every implementation
CALLS = {
    "torch.ops": lambda name, args: getattr(torch.ops.mikernels, name)(*args),
    "auto": lambda name, args: OPS[name](*args),
    "reference": lambda name, args: OPS[name](*args, impl="reference"),
    "cpp": lambda name, args: OPS[name](*args, impl="cpp"),
}


def test_every_schema_that_writes_is_listed():
    for name, op in OPS.items():
        assert bool(op.written) == op.default._schema.is_mutable
        assert bool(op.written) == name.endswith("_")


def written(name, args):
    return [args[i] for i in OPS[name].written if args[i] is not None]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", WRITERS)
def test_versions_count_writes(name, call):
    for sample in SAMPLES[name](LAYOUTS["dense"], 5, torch.float32):
        args = copies(sample)
        before = [t._version for t in written(name, args)]
        read = [t for i, t in enumerate(args) if i not in OPS[name].written]
        versions = [t._version for t in read if isinstance(t, torch.Tensor)]
        CALLS[call](name, args)
        assert all(t._version > b for t, b in zip(written(name, args), before, strict=True))
        assert [t._version for t in read if isinstance(t, torch.Tensor)] == versions


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", WRITERS)
def test_a_stale_backward_raises(name, call):
    for sample in SAMPLES[name](LAYOUTS["dense"], 5, torch.float32):
        for place in OPS[name].written:
            args = copies(sample)
            if args[place] is None:
                continue
            factor = torch.ones_like(args[place], requires_grad=True)
            loss = (factor * args[place]).sum()
            CALLS[call](name, args)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", WRITERS)
def test_inference_tensors_are_written_without_a_version(name, call):
    for sample in SAMPLES[name](LAYOUTS["dense"], 5, torch.float32):
        args = copies(sample)
        with torch.inference_mode():
            inferred = copies(sample)
            CALLS[call](name, inferred)
        CALLS[call](name, args)
        for a, b in zip(written(name, inferred), written(name, args), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", WRITERS)
def test_memory_that_is_shared_is_refused(name, call, inference):
    names = [a.name for a in OPS[name].default._schema.arguments]
    with torch.inference_mode(inference):
        for sample in SAMPLES[name](LAYOUTS["dense"], 5, torch.float32):
            for place in OPS[name].written:
                if sample[place] is None:
                    continue

                def refused(out, others, place=place, sample=sample):
                    args = list(copies(sample))
                    args[place] = out
                    for i, t in others.items():
                        args[i] = t
                    kept = copies(args)
                    with pytest.raises(ValueError, match=f"{name}: .*{names[place]}"):
                        CALLS[call](name, args)
                    for a, b in zip(args, kept, strict=True):
                        assert not isinstance(a, torch.Tensor) or torch.equal(a, b)

                out = sample[place]
                first = out[(slice(0, 1),) * out.dim()].clone()
                refused(first.expand(out.shape), {})
                if out.dim() > 1:
                    refused(
                        first.new_zeros(out.numel()).as_strided(out.shape, (1,) * out.dim()), {}
                    )
                for i, t in enumerate(sample):
                    same = isinstance(t, torch.Tensor) and i != place and t.dim() and t.numel()
                    if not same or t.dtype != out.dtype:
                        continue
                    # the last entry of the one is the first of the other
                    buffer = torch.zeros(out.numel() + t.numel() - 1, dtype=out.dtype)
                    mine = buffer[: out.numel()].view(out.shape)
                    theirs = buffer[out.numel() - 1 :].view(t.shape)
                    refused(mine, {i: theirs})


def test_a_write_beside_its_operands_in_one_buffer_is_allowed(impl):
    buffer = randint(6, 20).float()
    x, out = buffer[:, :6], buffer[:, 10:16]
    expected = out + x.T @ x
    mk.second_moment(x, out=out, impl=impl)
    assert torch.equal(out, expected)


PAIR = torch.ones(2, 3, 4), torch.ones(2, 5, 4)
EDGES = torch.ones(1, 2, 3, 4), torch.ones(1, 2, 5, 4)
# function of out -> result, and the shape of out
WITH_OUT = {
    "pairwise_products": (lambda **o: mk.pairwise_products(*PAIR, **o), (3, 5)),
    "second_moment": (lambda **o: mk.second_moment(PAIR[0], **o), (4, 4)),
    "edge_scores": (lambda **o: mk.edge_scores(*EDGES, **o), (3, 5)),
    "edge_scores_heads": (
        lambda **o: mk.edge_scores_heads(EDGES[0], torch.ones(3, 4, 4), EDGES[1], **o),
        (3, 5),
    ),
    "positional_dot": (
        lambda **o: mk.positional_dot(PAIR[0], torch.ones(6, 4), torch.zeros(6).long(), **o),
        (6, 2),
    ),
}


@one_impl
@pytest.mark.parametrize("name", WITH_OUT)
def test_out_is_checked(impl, name):
    function, shape = WITH_OUT[name]
    good = function(impl=impl)
    out = torch.zeros(*shape[::-1]).T
    assert function(out=out, impl=impl) is out and torch.equal(out, good)
    for bad, error, message in (
        (torch.zeros(shape[0], 1).expand(shape), ValueError, "out must have a place in memory"),
        (torch.zeros(sum(shape)).as_strided(shape, (1, 1)), ValueError, "out must have a place"),
        (torch.zeros(shape).half(), TypeError, "out must be torch.float32"),
        (torch.zeros(shape).long(), TypeError, "out must be torch.float32"),
        (torch.zeros(shape)[:-1], ValueError, "out must have shape"),
        (torch.zeros(1, *shape), ValueError, "out must have shape"),
        (torch.zeros(shape, device="meta"), ValueError, "out must be on cpu"),
        (torch.zeros(shape).to_sparse(), TypeError, "out must be dense"),
        (torch.zeros(shape).requires_grad_(), ValueError, "out must not require grad"),
        (torch.zeros(shape).tolist(), TypeError, "out must be a torch.Tensor, got list"),
    ):
        with pytest.raises(error, match=f"{name}: {message}"):
            function(out=bad, impl=impl)


@one_impl
@pytest.mark.parametrize("name", WITH_OUT)
def test_out_told_to_autograd(impl, name):
    function, shape = WITH_OUT[name]
    out, factor = torch.zeros(shape), torch.ones(shape, requires_grad=True)
    function(out=out, impl=impl)
    loss = (factor * out).sum()
    function(out=out, impl=impl)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@one_impl
def test_out_that_is_an_operand_is_refused(impl):
    a = torch.ones(4, 4)
    for function in (
        lambda: mk.second_moment(a, out=a, impl=impl),
        lambda: mk.pairwise_products(a, out=a, impl=impl),
        lambda: mk.pairwise_products(torch.ones(4, 4), a[:, :], out=a.T, impl=impl),
        lambda: mk.positional_dot(torch.ones(4, 2, 4), a, torch.zeros(4).long(), out=a, impl=impl),
    ):
        with pytest.raises(ValueError, match="out must share no memory with"):
            function()
    assert torch.equal(a, torch.ones(4, 4))


@pytest.mark.parametrize("again", [lambda t: torch.from_numpy(t.numpy()), torch.from_dlpack])
def test_memory_of_two_storages_is_shared_all_the_same(again):
    buffer = randint(4, 8).float()
    kept, x = buffer.clone(), buffer[:, :4]
    with pytest.raises(ValueError, match="second_moment: out must share no memory with x"):
        mk.second_moment(x, out=again(buffer)[:, 3:7])
    assert torch.equal(buffer, kept)
    mk.second_moment(x, out=again(buffer)[:, 4:])
    assert torch.equal(buffer[:, 4:], kept[:, 4:] + x.T @ x)


def test_tensors_without_memory_of_their_own_do_not_overlap():
    with FakeTensorMode():
        assert mk.second_moment(torch.ones(4, 4), out=torch.zeros(4, 4)).shape == (4, 4)
    out = torch.zeros(4, 4)
    with pytest.raises(RuntimeError, match="Batching rule not implemented"):
        torch.func.vmap(lambda x: mk.second_moment(x, out=out))(torch.ones(2, 3, 4))


def test_an_optimizer_step_between_forward_and_backward_raises():
    x, w, w_dec = randn(6, 8), *(randn(30, 8, seed=s).requires_grad_() for s in (1, 2))
    for p in (w, w_dec):
        p.grad = torch.ones_like(p)
    optimizer = RowAdam([w, w_dec])
    codes = mk.topk_encode(x.requires_grad_(), w, k=3)
    loss = mk.sparse_decode(codes, w_dec).sum()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_overlap():
    grid = torch.zeros(8, 10)
    apart = [
        (grid[:, :2], grid[:, 2:]),
        (grid[::2], grid[1::2]),
        (grid[1], grid[2]),
        (grid[:, 3], grid[:, 4]),
        (grid[::2, ::2], grid[::2, 1::2]),
        (grid, torch.zeros(8, 10)),
        (grid[:0], grid),
        (grid.view(2, 4, 2, 5)[0, :, 1], grid.view(2, 4, 2, 5)[:, :, 0]),
    ]
    shared = [
        (grid, grid),
        (grid, grid.T),
        (grid[:, :3], grid[:, 2:]),
        (grid[:, 0], grid[3]),
        (grid[2:5], grid[4]),
        (grid[0, :1].expand(5), grid[:, 0]),
        (grid[3, 3:4], grid[2:]),
        (grid.view(-1)[7:13], grid[:, :4]),
    ]
    for a, b in apart:
        assert not overlap(a, b) and not overlap(b, a)
    for a, b in shared:
        assert overlap(a, b) and overlap(b, a)
    one = grid.view(-1)
    for t in (grid, grid.T, grid[::3, ::2], grid[:, :1], one.as_strided((2, 3), (9, 4)), grid[:0]):
        assert not overlaps_itself(t)
    for t in (
        one.as_strided((3, 3), (1, 1)),
        grid[:1].expand(4, 10),
        one.as_strided((4, 3), (2, 3)),
    ):
        assert overlaps_itself(t)


def test_compile_of_a_write():
    def function(x, out):
        mk.second_moment(x, out=out)
        return out * 2

    x, out = randint(6, 4), torch.zeros(4, 4)
    version = out._version
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, out), 2 * x.T @ x) and torch.equal(out, x.T @ x)
    assert out._version > version
