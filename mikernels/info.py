# SPDX-License-Identifier: Apache-2.0
"""`mikernels info`: what a bug report or a benchmark needs to know about this machine."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

from mikernels._built import REMEDY, TORCH, build_facts, torch_fault
from mikernels._version import __version__
from mikernels.machine import cpu_flags, cpu_name

if TYPE_CHECKING:
    from mikernels._dispatch import Op

ENVIRONMENT = ("MIKERNELS_EXT", "MIKERNELS_ARCHS", "MIKERNELS_IMPL")
# the flags that the kernels look for, and those that explain a level that is missing
CPU_FLAGS = "avx2 fma f16c avx_vnni avx512f avx512bw avx512vl avx512dq avx512vbmi2 avx512_vnni "
CPU_FLAGS += "avx512_bf16 amx_tile amx_int8 amx_bf16 amx_fp16"
PACKAGES = ("torch", "triton", "numpy", "safetensors", "transformers", "sae-lens")
# backend -> operators whose kernels compile and have not been run on a GPU
NOT_RUN = {"cuda": ("by_feature", "mass_threshold")}
UNITS = {"gflops": "GFLOP/s", "gops": "GOP/s", "gbs": "GB/s"}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _absence(package: str) -> str:
    if package == "triton":
        return (
            "not installed: optional, for CUDA devices on Linux (pip install 'mikernels[triton]')"
        )
    if package == "torch":
        return f"not installed: {TORCH}"
    if package == "transformers":
        return "not installed: optional, for language models (pip install 'mikernels[models]')"
    return "not installed: optional"


def _cpu() -> dict[str, Any]:
    flags = cpu_flags()
    count = os.cpu_count()
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    features = [flag for flag in CPU_FLAGS.split() if flag in flags]
    return {"model": cpu_name(), "cores": count, "features": features}


def collect(peaks: bool = False) -> dict[str, Any]:
    """The facts, JSON-able, also where torch is absent or broken: then "torch" says why.

    Args:
        peaks: also measure the machine's peak rates (some seconds); None without the extension.
    """
    facts: dict[str, Any] = {
        "mikernels": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "cpu": _cpu(),
        "build": build_facts(),
        "environment": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
        "not_run": {backend: list(names) for backend, names in NOT_RUN.items()},
    }
    try:
        import torch

        torch.get_num_threads  # noqa: B018 - of an empty folder, too, there would be a module
    except Exception as error:  # whatever torch's own import raises: OSError, RuntimeError, ...
        reason = f"torch cannot be imported: {torch_fault(error) or error}"
        facts |= {"torch": reason, "threads": None, "cuda": None, "level": None}
        facts |= {"supported_levels": [], "operators": {}}
        facts["extension"] = {"loaded": False, "reason": reason}
        measured = None
    else:
        import mikernels
        from mikernels import _ext
        from mikernels._dispatch import OPS

        facts |= {
            "torch": "",
            "threads": torch.get_num_threads(),
            "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "level": mikernels.cpu_level(),
            "supported_levels": list(mikernels.supported_levels()),
            "extension": {"loaded": _ext.C is not None, "reason": _ext.MISSING},
            "operators": {name: _states(op) for name, op in sorted(OPS.items())},
        }
        measured = _ext.measure_peaks() if peaks else None
    if peaks:
        facts["peaks"] = measured
    return facts


def _states(op: Op) -> dict[str, str]:
    """Backend -> state on this machine: what only a GPU runs is not ready without one."""
    import torch

    seen = torch.cuda.is_available()
    return {
        name: "no GPU" if state == "ready" and name in ("triton", "cuda") and not seen else state
        for name, state in op.backends().items()
    }


def _facts_table(facts: dict[str, Any]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("mikernels", facts["mikernels"])
    table.add_row("python", f"{facts['python']}  [dim]{facts['platform']}[/]")
    for name, version in facts["packages"].items():
        table.add_row(name, version or f"[dim]{escape(_absence(name))}[/]")
    cpu = facts["cpu"]
    threads = "" if facts["threads"] is None else f", {facts['threads']} threads"
    table.add_row("cpu", f"{cpu['model']}, {cpu['cores']} cores{threads}")
    table.add_row("features", " ".join(cpu["features"]) or "[dim]none of those that are used[/]")
    table.add_row("cuda", facts["cuda"] or "[dim]no device[/]")
    if facts["extension"]["loaded"]:
        levels = " < ".join(
            f"[bold green]{level}[/]" if level == facts["level"] else level
            for level in facts["supported_levels"]
        )
        table.add_row("level in use", levels)
    build = facts["build"]
    if build.get("extension"):
        table.add_row("built with", escape(f"{build.get('compiler')}, torch {build.get('torch')}"))
        cuda = build.get("cuda", {})
        if cuda.get("nvcc"):
            text = f"nvcc {cuda['nvcc']}, for {' '.join(cuda['archs'])}"
        else:
            text = f"[dim]none: {escape(cuda.get('reason', 'not recorded'))}[/]"
        table.add_row("cuda kernels", text)
    environment = "  ".join(f"{name}={value}" for name, value in facts["environment"].items())
    table.add_row("environment", environment or f"[dim]{', '.join(ENVIRONMENT)} unset[/]")
    return table


def _operator_table(operators: dict[str, dict[str, str]]) -> tuple[Table, list[str]]:
    """The operator x backend table; reasons that several cells share become numbered notes."""
    backends = list(dict.fromkeys(name for states in operators.values() for name in states))
    reasons: list[str] = []
    table = Table(header_style="bold", title="operator x backend", title_justify="left")
    for column in ("operator", *backends):
        table.add_column(column)
    for name, states in operators.items():
        cells = []
        for backend in backends:
            state = states.get(backend, "not written")
            if state == "ready":
                cells.append("[green]ready[/]")
            elif len(state) <= 16:
                cells.append(f"[dim]{state}[/]")
            else:
                if state not in reasons:
                    reasons.append(state)
                cells.append(f"[yellow]absent ({reasons.index(state) + 1})[/]")
        table.add_row(name, *cells)
    return table, [f"({number}) {reason}" for number, reason in enumerate(reasons, 1)]


def render(facts: dict[str, Any], console: Console) -> None:
    """Print the facts for people."""
    console.print(_facts_table(facts))
    if facts["torch"]:
        text = f"Nothing can be computed:\n{escape(facts['torch'])}\n\nMend it:  {TORCH}"
        console.print(Panel(text, title="no torch", border_style="red", expand=False))
        return
    if not facts["extension"]["loaded"]:
        reason = facts["extension"]["reason"].split("; mend it with")[0]
        text = f"The compiled kernels are absent:\n{escape(reason)}\n\nMend it with  {REMEDY}"
        console.print(Panel(text, title="no extension", border_style="yellow", expand=False))
    table, notes = _operator_table(facts["operators"])
    console.print(table)
    for backend, names in facts["not_run"].items():
        notes.append(f"{backend} of {', '.join(names)}: compiles, not run on a GPU")
    for note in notes:
        console.print(note, style="dim", markup=False)
    if "peaks" not in facts:
        return
    if facts["peaks"] is None:
        console.print("measured peaks: none without the extension")
        return
    grid = Table(header_style="bold", title="measured peaks", title_justify="left")
    grid.add_column("rate")
    grid.add_column("value", justify="right")
    for name, value in facts["peaks"].items():
        rate, _, unit = name.rpartition("_")
        shown = f"{value:,.1f} {UNITS.get(unit, unit)}" if value else "[dim]no such unit[/]"
        grid.add_row(rate, shown)
    console.print(grid)
