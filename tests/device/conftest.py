# SPDX-License-Identifier: Apache-2.0
"""Tests of the Triton kernels: on a GPU, or on CPU tensors in Triton's interpreter.

`TRITON_INTERPRET=1 pytest tests/device` is how a machine without a GPU runs them, in a process of
its own, because Triton reads the variable when a kernel is defined. There bf16 is rounded as on a
GPU, and every launch is searched for races and for accesses outside its tensors.
"""

from pathlib import Path

import pytest
import torch

from mikernels import _triton

if _triton.interpreting() and not _triton.missing():
    import interpreter_bf16
    import interpreter_once
    import interpreter_races

    interpreter_once.install()
    interpreter_bf16.install()
    interpreter_races.install()

READY = _triton.interpreting() or torch.cuda.is_available()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = _triton.missing() or ("" if READY else "needs a GPU or TRITON_INTERPRET=1")
    here = Path(__file__).parent
    for item in items:
        if reason and here in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "dtype" in metafunc.fixturenames:
        metafunc.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])


@pytest.fixture
def device() -> str:
    return "cpu" if _triton.interpreting() else "cuda"
