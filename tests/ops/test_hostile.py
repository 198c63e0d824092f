# SPDX-License-Identifier: Apache-2.0
"""Raw operators raise on arguments they cannot have, and never crash."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from one_level import one_impl
from op_samples import HOSTILE, LAYOUTS, SAMPLES, copies
from oracle import identical

import mikernels as mk
from mikernels._dispatch import OPS
from mikernels._operands import Operands

DRIVER = Path(__file__).parents[1] / "support" / "hostile_driver.py"


@pytest.mark.parametrize("how", ["raw", "reference", "triton"])
def test_mangled_arguments_raise_and_never_crash(how):
    if how == "triton":
        pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, str(DRIVER), how],
        capture_output=True,
        text=True,
        env=os.environ | {"TRITON_INTERPRET": "1" if how == "triton" else "0"},
    )
    tail = done.stdout.splitlines()[-3:], done.stderr[-3000:]
    assert done.returncode == 0 and done.stdout.endswith("survived\n"), tail


# a reference adds to any floating dtype, and compares with the rank that there is
DEFINED = {"sae_gradients_: output of another dtype", "pairwise_topk: one rank"}


@pytest.mark.parametrize("name", sorted(HOSTILE.keys() - DEFINED))
def test_references_refuse_what_kernels_refuse(name):
    op, arguments = HOSTILE[name]
    with pytest.raises((RuntimeError, TypeError, ValueError, IndexError)):
        OPS[op](*arguments, impl="reference")


@pytest.mark.parametrize("name", sorted(OPS))
def test_a_missing_tensor_is_refused_before_anything_is_written(name):
    arguments = OPS[name].default._schema.arguments
    for sample in SAMPLES[name](LAYOUTS["dense"], 5, torch.float64):
        for place, argument in enumerate(arguments):
            if str(argument.type) != "Tensor":
                continue
            args = list(copies(sample))
            args[place] = None
            before = copies(args)
            with pytest.raises(TypeError, match=f"{name}: {argument.name} must be a tensor"):
                OPS[name](*args, impl="reference")
            for a, b in zip(args, before, strict=True):
                assert not isinstance(a, torch.Tensor) or identical(a, b)


@pytest.mark.parametrize("size", [2**20, 2**40])
def test_references_make_no_room_for_what_an_index_says(size):
    """Of 2^31 that would be 16 GB, before the index is found to be none."""
    with pytest.raises(RuntimeError, match=f"index {size} is out of bounds"):
        OPS["by_feature"](torch.tensor([0, size]), 4, impl="reference")
    slots = torch.tensor([0, 1, size]), torch.tensor([0, 1])
    with pytest.raises(ValueError, match=f"offsets must ascend from 0 to 2, got ones .* {size}"):
        OPS["feature_sum"](torch.ones(2, 1), torch.ones(2, 3), *slots, None, impl="reference")


def test_every_tensor_of_every_operator_has_a_rule():
    for op in OPS.values():
        tensors = {a.name for a in op.default._schema.arguments if "Tensor" in str(a.type)}
        assert tensors == {name for _, name, *_ in op.operands.tensors}


def test_operands_say_what_they_must_be():
    rules = {"a": "T[N,k]", "b": "acc[N*k]", "c": "i64[N+1]", "k": "1..N"}
    operands = Operands("op", ("a", "b", "c", "k"), rules)
    good = torch.ones(2, 3), torch.ones(6), torch.zeros(3, dtype=torch.int64), 2
    operands.check(good)
    operands.check((good[0].half(), *good[1:]))
    Operands("op", ("a", "b", "c", "k"), rules, {"b"}).check((good[0], None, *good[2:]))
    for place, bad, message in (
        (1, None, "op: b must be a tensor, got None"),
        (0, [1.0], "op: a must be a tensor, got list"),
        (0, torch.ones(2, 3).int(), r"op: a must be T\[N,k\] .* got torch.int32 \[2, 3\]"),
        (1, torch.ones(5), r"op: b must be acc\[N\*k\] .* got torch.float32 \[5\]"),
        (1, torch.ones(6).half(), r"op: b must be acc\[N\*k\] .* got torch.float16"),
        (2, torch.zeros(2, dtype=torch.int64), r"op: c must be i64\[N\+1\]"),
        (3, 0, r"op: k must be in 1\.\.2, got 0"),
        (3, 3, r"op: k must be in 1\.\.2, got 3"),
    ):
        arguments = [*good]
        arguments[place] = bad
        with pytest.raises((TypeError, ValueError), match=message):
            operands.check(arguments)
    with pytest.raises(ValueError, match="operands must name its arguments"):
        Operands("op", ("a",), {"b": "T[N]"})


def test_operands_that_depend_on_two_others():
    rules = {"a": "T[N,k] or T[S] with t", "b": "T[N,d] or T[L,N,d] with l", "t": "i64[S]"}
    names = ("a", "b", "t", "l")
    operands = Operands("op", names, rules | {"l": "i64[F]"}, {"t", "l"})
    padded, ragged, tokens = torch.ones(2, 3), torch.ones(5), torch.zeros(5, dtype=torch.int64)
    one, each, levels = torch.ones(2, 4), torch.ones(3, 2, 4), torch.zeros(6, dtype=torch.int64)
    for a, t in ((padded, None), (ragged, tokens)):
        for b, given in ((one, None), (each, levels)):
            operands.check((a, b, t, given))
            for bad in (
                (padded if a is ragged else ragged, b, t, given),
                (a, each if b is one else one, t, given),
            ):
                with pytest.raises(ValueError, match="op: [ab] must be"):
                    operands.check(bad)


VALUES, INDICES = torch.ones(2, 3), torch.tensor([[0, 1, 2], [3, 4, 5]])


@pytest.mark.parametrize(
    "values, indices, n_features, error, message",
    [
        (VALUES, INDICES, 5, ValueError, r"indices must be in 0\.\.4, got 5"),
        (VALUES, INDICES - 1, 6, ValueError, r"indices must be in 0\.\.5, got -1"),
        (VALUES, INDICES + 2**62, 6, ValueError, r"indices must be in 0\.\.5, got 4611"),
        (VALUES, INDICES, 0, ValueError, "indices must be none, for there is nothing to index"),
        (VALUES, INDICES, -1, ValueError, "n_features must be at least 0, got -1"),
        (VALUES, INDICES, 6.0, TypeError, "n_features must be an int, got float"),
        (VALUES, INDICES, True, TypeError, "n_features must be an int, got bool"),
        (VALUES, INDICES.int(), 6, TypeError, "indices must be int64, got torch.int32"),
        (VALUES.tolist(), INDICES, 6, TypeError, "values must be a torch.Tensor, got list"),
    ],
)
def test_codes_of_bad_indices_are_refused(values, indices, n_features, error, message):
    with pytest.raises(error, match=f"SparseCodes: {message}"):
        mk.SparseCodes(values, indices, n_features)


@one_impl
@pytest.mark.parametrize("index", [6, -1, 2**40, -(2**62)])
def test_codes_changed_in_place_reach_no_foreign_memory(impl, index):
    codes = mk.SparseCodes(VALUES, INDICES.clone(), 6)
    before = codes.by_feature()
    codes.indices[1, 0] = index
    for use in (
        codes.to_csr,
        codes.by_feature,
        codes.to_dense,
        codes.fired,
        lambda: mk.sparse_decode(codes, torch.ones(6, 4), impl=impl),
    ):
        with pytest.raises((ValueError, RuntimeError, IndexError), match="ind(ex|ices)"):
            use()
    codes.indices[1, 0] = 3
    for a, b in zip(codes.by_feature(), before, strict=True):
        assert torch.equal(a, b)


def test_slots_follow_indices_that_change():
    codes = mk.SparseCodes(VALUES, INDICES.clone(), 6)
    assert codes.by_feature()[0].tolist() == [0, 1, 2, 3, 4, 5, 6]
    codes.indices.fill_(0)
    assert codes.by_feature()[0].tolist() == [0, 6, 6, 6, 6, 6, 6]


def test_codes_in_a_graph_are_checked():
    def function(values, indices):
        return mk.SparseCodes(values, indices, 6).to_dense()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(VALUES, INDICES), function(VALUES, INDICES))
    with pytest.raises((ValueError, RuntimeError), match=r"indices must be in 0\.\.5"):
        compiled(VALUES, INDICES + 1)


def test_by_feature_checks_its_indices():
    for bad, message in ((INDICES[1] + 1, "got 6"), (INDICES[0] - 1, "got -1")):
        with pytest.raises(ValueError, match=rf"by_feature: indices must be in 0\.\.5, {message}"):
            mk.by_feature(bad, 6)
