# SPDX-License-Identifier: Apache-2.0
"""Every kernel in every pinned configuration, compiled for GPUs that are not there."""

import ast
import importlib
import inspect
import pkgutil
from collections import defaultdict

import pytest

pytest.importorskip("triton")

from triton.runtime.jit import JITFunction

from mikernels import kernels
from mikernels.kernels.common import offline
from mikernels.kernels.common.launch import Kernel


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
    sm_90 and sm_100 only matrix instructions differ: what cannot break twice is compiled once."""
    if "fp16" in name or "odd" in name:
        return [target for target in case.targets if target == "sm_90"]
    first = next(other for other, twin in CASES.items() if twin.kernel is case.kernel) == name
    if case.matrix or first:
        return case.targets
    return [target for target in case.targets if target in ("sm_90", "gfx942")]


COMPILED = [(name, target) for name, case in CASES.items() for target in targets(name, case)]


@pytest.mark.parametrize("name, target", COMPILED)
def test_compiles_without_spills(name, target):
    case = CASES[name]
    report = offline.compile_case(case, target)
    assert report.spills == 0, report
    assert report.shared <= offline.SHARED_LIMIT[target], report
    assert (report.matrix_instructions > 0) == case.matrix, report


def test_no_case_hides_another():
    assert len(CASES) == len(ALL)


def test_every_kernel_has_a_case():
    compiled = {case.kernel for case in CASES.values()}
    for module in modules():
        for name, value in vars(module).items():
            if isinstance(value, Kernel):
                assert value in compiled, f"{module.__name__}.{name} is compiled by no case"


def test_only_what_pins_its_options_is_launched():
    """`f[grid](...)` is of a Kernel: Triton's own function would be compiled with its defaults."""
    launched = 0
    for info in pkgutil.walk_packages(kernels.__path__, f"{kernels.__name__}."):
        module = importlib.import_module(info.name)
        for node in ast.walk(ast.parse(inspect.getsource(module))):
            name = isinstance(node, ast.Subscript) and ast.unparse(node.value)
            found = vars(module).get(name)
            assert not isinstance(found, JITFunction), f"{info.name}: {name}"
            launched += isinstance(found, Kernel)
        bare = [n for n, f in vars(module).items() if isinstance(f, JITFunction)]
        assert not [n for n in bare if n.endswith("_kernel")], info.name
    assert launched > 30
    seen = []
    Kernel(defaultdict(lambda: lambda *args, **options: seen.append(options)))[(1,)](0, num_warps=1)
    assert seen == [{"enable_fp_fusion": True, "num_warps": 1}]
