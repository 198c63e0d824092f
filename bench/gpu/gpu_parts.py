# SPDX-License-Identifier: Apache-2.0
"""What gpu_check runs in processes of their own: `-m mikernels.bench.gpu.gpu_parts PART FILE`.

Every part writes its findings as JSON and exits with 1 if one of them is bad. What runs is every
registered operator with the tests' samples, which are tiny and in every layout of slots, and what
is measured on a GPU at a small shape, which has several programs and tiles. No list of its own: a
new operator is in both.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import mikernels
from mikernels._dispatch import OPS, Op
from mikernels.files import finite, write_atomic

from .. import load, names
from ..harness import machine
from ..harness.spec import (
    DTYPES,
    AttentionShape,
    Outputs,
    PairShape,
    Provider,
    Runner,
    Shape,
    Unavailable,
    cast,
)
from . import assumptions
from . import device as devices
from .device import Cpu

# odd sizes: no tile divides them
SMALL: dict[str, Any] = {
    "sae": Shape("small", 67, 200, 9001, 12),
    "pairs": PairShape("small", 2, 3, 67, 41, 200, 12),
    "attention": AttentionShape("small", 2, 4, 2, 167, 40),
}
# enough for several programs, and for slots of one feature in several chunks
TOKENS = 67
RUNS = 20
# processes among which the first run is divided, for the sake of Triton's compiler
WORKERS = 8
# what no graph can hold, because the host waits for a number from the device
WAITING = {"threshold_encode", "pairwise_topk", "mass_threshold"}

Findings = dict[str, Any]
Case = tuple[str, Provider, Any, str]


def _measured(device: Cpu, few: bool = False) -> Iterator[Case]:
    """(name, provider, inputs, mode) of each of ours in each dtype; few: little, in fp32."""
    for op in names(gpu=True):
        benchmark = load(op)
        shape = SMALL[benchmark.family]
        if few:
            size = "queries" if benchmark.family == "attention" else "n"
            shape = replace(shape, **{size: 5})
        for mode in benchmark.modes:
            for dtype in ("fp32",) if few else benchmark.gpu_dtypes:
                if dtype != "fp32" and mode in benchmark.fp32_modes:
                    continue
                with device.making():
                    inputs = cast(benchmark.inputs(shape, mode, 0), DTYPES[dtype])
                for provider in benchmark.providers:
                    if provider.name.startswith("ours") and device.kind in provider.devices:
                        yield f"{op} {mode} {dtype} {provider.name}", provider, inputs, mode


def _registered(device: Cpu, few: bool = False) -> Iterator[Case]:
    """As `_measured`, of every operator and implementation, with the samples of the tests."""
    support = Path(__file__).resolve().parents[2] / "tests" / "support"
    if str(support) not in sys.path:
        sys.path.append(str(support))
    samples = importlib.import_module("op_samples")
    cuda = device.target.type == "cuda"
    for name, op in OPS.items():
        for dtype, torch_dtype in DTYPES.items():
            for impl in ("", "cuda") if cuda and op.state("cuda") == "ready" else ("",):
                made = samples.SAMPLES[name](samples.dense, 5 if few else TOKENS, torch_dtype)
                for number, arguments in enumerate(made):
                    title = f"{name} sample {number} {dtype} {impl}".rstrip()
                    yield title, _provider(op, impl), on(device.target, arguments), "fwd"


def on(target: torch.device | str, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Copies of the arguments, there."""
    return tuple(a.to(target, copy=True) if isinstance(a, torch.Tensor) else a for a in arguments)


def outputs_of(op: Op, arguments: tuple[Any, ...], impl: str = "") -> Outputs:
    """What the operator returns and what it writes, into copies."""
    arguments = tuple(a.clone() if isinstance(a, torch.Tensor) else a for a in arguments)
    results = op(*arguments, impl=impl) if impl else op.default(*arguments)
    results = results if isinstance(results, tuple | list) else (results,)
    found = {f"result {i}": r for i, r in enumerate(results)}
    found |= {f"argument {i}": arguments[i] for i in op.written}
    return {name: t for name, t in found.items() if isinstance(t, torch.Tensor)}


def _provider(op: Op, impl: str) -> Provider:
    return Provider("ours", lambda inputs, mode: Runner(lambda: outputs_of(op, inputs, impl)))


def _cases(device: Cpu, few: bool = False) -> Iterator[Case]:
    yield from _registered(device, few)
    yield from _measured(device, few)


def _run(device: Cpu, provider: Provider, inputs: Any, mode: str) -> Outputs:
    with device.making():
        runner = provider.build(inputs, mode)
    if runner.before is not None:
        runner.before()
    return {name: tensor.clone() for name, tensor in runner.run().items()}


def _each(
    cases: Iterator[Case], device: Cpu, judge: Callable[[Provider, Any, str], str]
) -> Findings:
    """judge answers "" or what is wrong; a provider that cannot run here is left out."""
    findings: Findings = {"wrong": {}, "right": [], "absent": {}}
    for name, provider, inputs, mode in cases:
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


def once(device: Cpu, few: bool = False, share: str = "0/1") -> Findings:
    """Everything once, to see that it runs at all; with share "2/8" every eighth case."""
    number, workers = map(int, share.split("/"))

    def judge(provider: Provider, inputs: Any, mode: str) -> str:
        if not few:
            # a sanitizer is to see what is read before it is written
            device.poison()
        outputs = _run(device, provider, inputs, mode)
        bad = [name for name, t in outputs.items() if t.isnan().any()]
        return f"NaN in {', '.join(bad)}" if bad else ""

    mine = (case for i, case in enumerate(_cases(device, few)) if i % workers == number)
    return _each(mine, device, judge)


def tiny(device: Cpu) -> Findings:
    """The same with five tokens, for the sanitizers, which take long."""
    return once(device, few=True)


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

    return _each(_cases(device), device, judge)


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

    # a step waits for its losses
    waiting = WAITING | {"step"}
    cases = (case for case in _cases(device) if case[0].split()[0] not in waiting)
    return _each(cases, device, judge)


def two_devices(device: Cpu) -> Findings:
    """Every operator on a second GPU while the first is the current one: there, the same bits."""
    second = device.second()
    if second is None:
        return {"wrong": {}, "right": [], "absent": {"a second device": "there is one alone"}}
    target = torch.device(second)

    def judge(provider: Provider, inputs: Any, mode: str) -> str:
        expected = _run(device, provider, inputs, mode)
        found = provider.build(on(target, inputs), mode).run()
        away = [name for name, t in found.items() if t.device != target]
        if away:
            return f"{', '.join(away)} not on {target}"
        other = [
            name for name, t in found.items() if not _same(t.to(device.target), expected[name])
        ]
        return f"other values in {', '.join(other)}" if other else ""

    return _each(_registered(device), device, judge)


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


def matrix_units_part(device: Cpu) -> Findings:
    # Triton may be missing, and is then wanted by no other part
    from . import matrix_units

    return matrix_units.run(device)


PARTS: dict[str, Callable[[Cpu], Findings]] = {
    "matrix_units": matrix_units_part,
    "facts": facts,
    "once": once,
    "tiny": tiny,
    "determinism": determinism,
    "graph": graph,
    "two_devices": two_devices,
    "compile": compile,
    "falsify": assumptions.run,
}


def divided(path: str, workers: int) -> Findings:
    """`once` by several processes."""
    parts = [Path(f"{path}.{i}") for i in range(workers)]
    command = sys.executable, "-m", "mikernels.bench.gpu.gpu_parts", "once"
    running = [
        subprocess.Popen([*command, str(part), f"{i}/{workers}"]) for i, part in enumerate(parts)
    ]
    findings: Findings = {"wrong": {}, "right": [], "absent": {}}
    for process, part in zip(running, parts, strict=True):
        code = process.wait()
        if not part.exists():
            findings["wrong"][part.name] = f"its process ended with {code}"
            continue
        found = json.loads(part.read_text())
        part.unlink()
        findings["right"] += found["right"]
        for kind in ("wrong", "absent"):
            findings[kind] |= found[kind]
    return findings


def main(words: list[str], device: Cpu | None = None) -> int:
    name, path, *share = words
    if share:
        findings = once(device or devices.get("cuda"), share=share[0])
    elif name == "once" and device is None:
        findings = divided(path, WORKERS)
    else:
        findings = PARTS[name](device or devices.get("cuda"))
    write_atomic(Path(path), json.dumps(finite(findings), indent=1, default=str) + "\n")
    wrong = findings.get("wrong", {})
    for subject, reason in wrong.items():
        print(f"{subject}: {reason}")
    print(f"{name}: {len(wrong)} wrong, {len(findings.get('right', []))} right")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
