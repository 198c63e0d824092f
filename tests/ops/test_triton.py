# SPDX-License-Identifier: Apache-2.0
"""When Triton runs an operator, and what is said when it cannot; without a GPU."""

import pytest
import torch
from oracle import randn

from mikernels import SparseCodes, _triton, row_topk
from mikernels._dispatch import OPS

CUDA = torch.device("cuda", 0)


# CUDA C++ alone, or its reference, a sort
WITHOUT = {"mass_threshold"}


def test_every_operator_has_a_launcher():
    assert {name for name, op in OPS.items() if op._triton is None} == WITHOUT


def test_the_cuda_key_has_an_owner_where_something_launches():
    registered = torch._C._dispatch_has_kernel_for_dispatch_key
    for name, op in OPS.items():
        launched = name not in WITHOUT and not _triton.missing()
        built = op.backends()["cuda"] == "ready"
        assert registered(f"mikernels::{name}", "CUDA") == (launched or built)
        # beside CUDA C++, Triton's has a name of its own
        named = [hasattr(torch.ops.mikernels, f"{name}_{kind}") for kind in ("cuda", "triton")]
        assert named == [built, built and launched]


def test_importing_mikernels_does_not_import_triton(run_python):
    assert run_python("import sys, mikernels; print('triton' in sys.modules)").strip() == "False"


@pytest.mark.skipif(_triton.interpreting(), reason="the interpreter takes CPU tensors")
def test_a_named_implementation_says_why_it_cannot_run(monkeypatch):
    monkeypatch.setattr(_triton, "missing", lambda: "")
    with pytest.raises(
        RuntimeError, match=r"^row_topk: impl='triton' runs on cuda tensors, got cpu$"
    ):
        row_topk(randn(2, 5), 2, impl="triton")
    monkeypatch.setattr(_triton, "missing", lambda: "needs Triton, which is not installed; do")
    with pytest.raises(
        RuntimeError, match="row_topk: impl='triton' is not available: needs Triton"
    ):
        row_topk(randn(2, 5), 2, impl="triton")


def test_old_devices_are_told_what_is_needed(monkeypatch):
    monkeypatch.setattr(_triton, "missing", lambda: "")
    monkeypatch.setattr(_triton, "_capability", lambda index: (7, 5))
    reason = "needs compute capability 8.0 or newer, cuda:0 has 7.5"
    assert _triton.unsupported(CUDA) == reason
    monkeypatch.setattr(_triton, "_capability", lambda index: (9, 0))
    assert _triton.unsupported(CUDA) == ""


def test_named_triton_refuses_fp64(monkeypatch):
    monkeypatch.setattr(_triton, "missing", lambda: "")
    monkeypatch.setattr(_triton, "unsupported", lambda device: "")
    message = "row_topk: impl='triton' takes float32, bfloat16 and float16 tensors, got float64"
    with pytest.raises(RuntimeError, match=message):
        row_topk(randn(2, 5, dtype=torch.float64), 2, impl="triton")


@pytest.mark.parametrize("before", [True, False])
def test_sums_are_full_only_within(before):
    pytest.importorskip("triton")
    from mikernels.kernels.common.full_sums import full_sums

    matmul = torch.backends.cuda.matmul
    names = "allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction"
    kept = [getattr(matmul, name) for name in names]
    try:
        for name in names:
            setattr(matmul, name, before)
        with pytest.raises(ZeroDivisionError), full_sums():
            assert [getattr(matmul, name) for name in names] == [False, False]
            raise ZeroDivisionError
        assert [getattr(matmul, name) for name in names] == [before, before]
        # of two threads the one that came first leaves first
        first, second = full_sums(), full_sums()
        for step, expected in (
            (first.__enter__, False),
            (second.__enter__, False),
            (lambda: first.__exit__(None, None, None), False),
            (lambda: second.__exit__(None, None, None), before),
        ):
            step()
            assert [getattr(matmul, name) for name in names] == [expected, expected]
    finally:
        for name, value in zip(names, kept, strict=True):
            setattr(matmul, name, value)


def test_the_rule_of_auto(monkeypatch):
    """fp64, and devices that Triton does not support, run the reference."""
    monkeypatch.setattr(_triton, "unsupported", lambda device: "")
    x, w = (torch.empty(2, 3, device="meta") for _ in range(2))
    assert _triton.takes([None, x, w, 3])
    assert not _triton.takes([x.double(), w])
    # a 0-dim fp64 tensor is a setting (Adam's lr), not data
    assert _triton.takes([x, torch.zeros((), dtype=torch.float64, device="meta")])
    monkeypatch.setattr(_triton, "unsupported", lambda device: "too old")
    assert not _triton.takes([x, w])


def test_codes_live_on_one_device():
    with pytest.raises(ValueError, match="SparseCodes: values and indices must be on one device"):
        SparseCodes(randn(2, 3), torch.zeros(2, 3, dtype=torch.int64, device="meta"), 9)
