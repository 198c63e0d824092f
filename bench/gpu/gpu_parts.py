# SPDX-License-Identifier: Apache-2.0
"""What gpu_check runs in processes of their own: `-m mikernels.bench.gpu.gpu_parts PART FILE`.

Every part writes its findings as JSON and exits with 1 if one of them is bad. The operators are the
benchmarks' own providers at a small shape, so that one list serves all.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import mikernels
from mikernels._dispatch import OPS
from mikernels.files import finite, write_atomic

from .. import load, names
from ..harness import machine
from ..harness.spec import DTYPES, Outputs, Provider, Shape, Unavailable, cast
from . import assumptions
from . import device as devices
from .device import Cpu

# odd sizes: no tile divides them
SMALL = Shape("small", 67, 200, 9001, 12)
RUNS = 20
SAE = names("sae", gpu=True)
# what a graph can hold: step waits for its losses
GRAPHED = tuple(op for op in SAE if op != "step")

Findings = dict[str, Any]


def _ours(
    device: Cpu, ops: tuple[str, ...], shape: Shape
) -> Iterator[tuple[str, Provider, Any, str]]:
    """(name, provider, inputs, mode) of each of ours in each dtype."""
    for op in ops:
        benchmark = load(op)
        for mode in benchmark.modes:
            for dtype in benchmark.gpu_dtypes:
                if dtype != "fp32" and mode in benchmark.fp32_modes:
                    continue
                with device.making():
                    inputs = cast(benchmark.inputs(shape, mode, 0), DTYPES[dtype])
                for provider in benchmark.providers:
                    if provider.name.startswith("ours") and device.kind in provider.devices:
                        yield f"{op} {mode} {dtype} {provider.name}", provider, inputs, mode


def _run(device: Cpu, provider: Provider, inputs: Any, mode: str) -> Outputs:
    with device.making():
        runner = provider.build(inputs, mode)
    if runner.before is not None:
        runner.before()
    return {name: tensor.clone() for name, tensor in runner.run().items()}


def _each(
    device: Cpu,
    ops: tuple[str, ...],
    judge: Callable[[Provider, Any, str], str],
    shape: Shape = SMALL,
) -> Findings:
    """judge answers "" or what is wrong; a provider that cannot run here is left out."""
    findings: Findings = {"wrong": {}, "right": [], "absent": {}}
    for name, provider, inputs, mode in _ours(device, ops, shape):
        try:
            wrong = judge(provider, inputs, mode)
            device.settle()
        except Unavailable as error:
            findings["absent"][name] = str(error)
            continue
        except Exception as error:
            # one operator's failure must not hide the others'
            wrong = f"{type(error).__name__}: {error}".splitlines()[0]
        if wrong:
            findings["wrong"][name] = wrong
        else:
            findings["right"].append(name)
    return findings


def facts(device: Cpu) -> Findings:
    """The machine, its ceilings, and what every operator has there."""
    backends = {name: op.backends() for name, op in sorted(OPS.items())}
    found = machine.facts(device)
    wrong = {} if found["build"].get("extension") else {"extension": "it is not built"}
    return {
        "machine": found,
        "peaks": machine.peaks(device),
        "backends": backends,
        "wrong": wrong,
    }


def once(device: Cpu, ops: tuple[str, ...] = SAE, shape: Shape = SMALL) -> Findings:
    """Every operator once, to see that it runs at all."""

    def judge(provider: Provider, inputs: Any, mode: str) -> str:
        outputs = _run(device, provider, inputs, mode)
        bad = [name for name, t in outputs.items() if t.isnan().any()]
        return f"NaN in {', '.join(bad)}" if bad else ""

    return _each(device, ops, judge, shape)


def tiny(device: Cpu) -> Findings:
    """The same with five tokens, for the sanitizers, which take long."""
    return once(device, GRAPHED, replace(SMALL, n=5))


def determinism(device: Cpu) -> Findings:
    """The same bits in 20 runs, with other memory contents in between."""

    def judge(provider: Provider, inputs: Any, mode: str) -> str:
        first = _run(device, provider, inputs, mode)
        for number in range(1, RUNS):
            device.poison()
            again = _run(device, provider, inputs, mode)
            other = [name for name, t in again.items() if not _same(t, first[name])]
            if other:
                return f"run {number} differs in {', '.join(other)}"
        return ""

    return _each(device, SAE, judge)


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.nan_to_num(nan=7.0), b.nan_to_num(nan=7.0))


def graph(device: Cpu) -> Findings:
    """Captured in a CUDA graph and replayed: the same outputs as without one."""
    capture = getattr(device, "capture", None)
    assert capture is not None, "graphs are CUDA's"

    def judge(provider: Provider, inputs: Any, mode: str) -> str:
        if mode == "bwd" and provider.name == "ours_autograd":
            return ""
        expected = _run(device, provider, inputs, mode)
        with device.making():
            runner = provider.build(inputs, mode)
        if runner.before is not None:
            # autograd's graph belongs to the call before: forward and backward are captured as one
            before, run = runner.before, runner.run
            outputs = capture(lambda: (before(), run())[1])
        else:
            outputs = capture(runner.run)
        if "param" in outputs:
            # it moves at every call; that the capture and its replay worked is what is asked
            return ""
        other = [name for name, t in outputs.items() if not _same(t, expected[name])]
        return f"other values in {', '.join(other)}" if other else ""

    return _each(device, GRAPHED, judge)


def compile(device: Cpu) -> Findings:
    """torch.compile(fullgraph=True), forward and backward, against eager."""
    draw = torch.Generator(device=device.target).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device.target, generator=draw)

    def sae(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        codes = mikernels.topk_encode(x, w, k=SMALL.k, b_dec=b)
        return mikernels.sparse_decode(codes, w, b)

    def top(x: torch.Tensor) -> torch.Tensor:
        return mikernels.row_topk(x, SMALL.k)[0]

    operands = normal(SMALL.n, SMALL.d), normal(SMALL.f, SMALL.d), normal(SMALL.d)
    findings: Findings = {"wrong": {}, "right": []}
    functions: dict[str, tuple[Callable[..., torch.Tensor], tuple[torch.Tensor, ...]]] = {
        "encode and decode": (sae, operands),
        "row_topk": (top, (normal(SMALL.n, SMALL.f),)),
    }
    for name, (function, tensors) in functions.items():
        answers = []
        for f in (function, torch.compile(function, fullgraph=True)):
            leaves = [t.clone().requires_grad_() for t in tensors]
            y = f(*leaves)
            answers.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
        pairs = zip(*answers, strict=True)
        # torch's max keeps a NaN, Python's would not
        off = float(torch.stack([(a - b).abs().max() / b.abs().max() for a, b in pairs]).max())
        # the compiler fuses what is around the operators: fp32 rounding of sums of F terms
        if off <= 1e-4:
            findings["right"].append(name)
        else:
            findings["wrong"][name] = f"off by {off:.1e}"
    return findings


PARTS: dict[str, Callable[[Cpu], Findings]] = {
    "facts": facts,
    "once": once,
    "tiny": tiny,
    "determinism": determinism,
    "graph": graph,
    "compile": compile,
    "falsify": assumptions.run,
}


def main(words: list[str], device: Cpu | None = None) -> int:
    name, path = words
    findings = PARTS[name](device or devices.get("cuda"))
    write_atomic(Path(path), json.dumps(finite(findings), indent=1, default=str) + "\n")
    wrong = findings.get("wrong", {})
    for subject, reason in wrong.items():
        print(f"{subject}: {reason}")
    print(f"{name}: {len(wrong)} wrong, {len(findings.get('right', []))} right")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
