# SPDX-License-Identifier: Apache-2.0
"""Every kernel in every pinned configuration, compiled for GPUs that are not there."""

import importlib
import pkgutil
import re

import pytest

pytest.importorskip("triton")

from mikernels import kernels
from mikernels.kernels.common import offline


def modules():
    for info in pkgutil.walk_packages(kernels.__path__, f"{kernels.__name__}."):
        module = importlib.import_module(info.name)
        if hasattr(module, "cases"):
            yield module


def stem(module):
    return module.__name__.rpartition(".")[2]


ALL = [(f"{stem(module)}: {case.name}", case) for module in modules() for case in module.cases()]
CASES = dict(ALL)


def targets(name, case):
    """fp16 differs from bf16 in conversions only, odd sizes in the width of loads; between sm_80,
    sm_90 and sm_100 only matrix instructions differ: what cannot break twice is compiled once.
    sm_89 runs sm_80's code, in less shared memory."""
    if "fp16" in name or "odd" in name:
        return [target for target in case.targets if target == "sm_90"]
    first = next(other for other, twin in CASES.items() if twin.kernel is case.kernel) == name
    if case.matrix or first:
        return [target for target in case.targets if target != "sm_89"]
    return [target for target in case.targets if target in ("sm_90", "gfx942")]


COMPILED = [(name, target) for name, case in CASES.items() for target in targets(name, case)]


@pytest.mark.parametrize("name, target", COMPILED)
def test_compiles_without_spills(name, target):
    case = CASES[name]
    report = offline.compile_case(case, target)
    assert report.spills == 0, report
    assert report.shared <= offline.SHARED_LIMIT[target], report
    if target == "sm_80" and "sm_89" in case.targets:
        assert report.shared <= offline.SHARED_LIMIT["sm_89"], report
    assert (report.matrix_instructions > 0) == case.matrix, report


def test_no_product_is_summed_in_what_a_loop_carries():
    """`multiply` adds in fp32 registers what the matrix unit, which truncates, has summed; the
    compiler would have the unit add a product to what it is added to, where it may."""
    code = offline.compiled(CASES["grad_gram: bf16"], "sm_90").asm["ttir"]
    loops = " ".join(re.findall(r"iter_args\((.*?)\) ->", code))
    begun = re.findall(r"tt\.dot %\w+, %\w+, (%\w+)", code)
    assert begun and not set(begun) & set(re.findall(r"(%\w+) =", loops))


def test_no_case_hides_another():
    assert len(CASES) == len(ALL)


def test_every_kernel_has_a_case():
    from triton.runtime.jit import JITFunction

    compiled = {case.kernel for case in CASES.values()}
    for module in modules():
        for name, value in vars(module).items():
            if isinstance(value, JITFunction) and name.endswith("_kernel"):
                assert value in compiled, f"{module.__name__}.{name} is compiled by no case"
