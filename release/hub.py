# SPDX-License-Identifier: Apache-2.0
"""The operators as a kernel of Hugging Face's Hub: `make hub` writes what its builder takes.

    python release/hub.py FOLDER

A kernel of the Hub is loaded from any path, under any name, several versions in one process. So it
is the operators alone, with what they stand on and without dependencies: what `mikernels.ops`
imports. Imports of each other become relative, the builder gives the operators' namespace
(`_ops.py`, TORCH_EXTENSION_NAME), and build.toml lists every file of csrc/.

The format: https://huggingface.co/docs/kernels/builder/writing-kernels
"""

from __future__ import annotations

import ast
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# what a kernel of the Hub may import; pydantic only where `mikernels tune` has written a table, and
# safetensors only at the level of the call log that saves calls
ALLOWED = {"torch", "triton", "pydantic", "safetensors", *sys.stdlib_module_names}
# the CPU's flags of setup.py that results or speed depend on
FLAGS = ("-O3", "-fvisibility=hidden", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math")
DEFINES = ("-DMIK_NAMESPACE=TORCH_EXTENSION_NAME", "-DTORCH_STABLE_ONLY")
NVCC_FLAGS = ("-O3", "-Xcompiler=-fvisibility=hidden")
# the oldest torch whose stable ABI has parallel_for
TORCH = "2.10"

FLAKE = """\
{
  description = "mikernels: kernels for mechanistic interpretability";
  inputs.kernel-builder.url = "github:huggingface/kernels";
  outputs = { self, kernel-builder }:
    kernel-builder.lib.genKernelFlakeOutputs { inherit self; path = ./.; };
}
"""

CARD = """\
---
library_name: kernels
license: apache-2.0
---

The operators of [mikernels](https://github.com/mikernels/mikernels), version {version}: fast, exact
kernels for mechanistic interpretability, on CPU (C++), on NVIDIA GPUs (CUDA C++ and Triton).
Training, circuits and the command line are in the package: `pip install mikernels`.

```python
import torch
from kernels import get_kernel

mikernels = get_kernel("mikernels/mikernels", version={major})
codes = mikernels.topk_encode(torch.randn(8, 64), torch.randn(1024, 64), k=4)
```
"""

# importing it loads the library that the builder made, as importing the package's own _C does
LOADED = """\
# SPDX-License-Identifier: Apache-2.0
from . import _ops as _ops
"""


def source_of(module: str) -> Path | None:
    """The file of a module of ours; None for what is none: a name that a module defines."""
    parts = module.split(".")[1:]
    folder = ROOT / "kernels" if parts[:1] == ["kernels"] else ROOT / "mikernels"
    path = folder.joinpath(*(parts[1:] if parts[:1] == ["kernels"] else parts))
    if (path / "__init__.py").exists():
        return path / "__init__.py"
    return path.with_suffix(".py") if path.with_suffix(".py").exists() else None


def imported(module: str, path: Path) -> set[str]:
    """What a file imports, wherever in it: modules, and names that may be modules, absolute."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level]
            base = ".".join(filter(None, (".".join(above) if node.level else "", node.module)))
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return found


def modules() -> dict[str, Path]:
    """The modules of the kernel: the operators, Triton's, and all that they import."""
    rooms = [f"mikernels.{name}" for name in ("ops", "kernels")]
    waiting = [
        ".".join((room, *path.relative_to(source_of(room).parent).with_suffix("").parts))
        for room in rooms
        for path in source_of(room).parent.rglob("*.py")
    ]
    found: dict[str, Path] = {}
    while waiting:
        module = waiting.pop().removesuffix(".__init__")
        path = source_of(module)
        # written by the builder; written below
        if path is None or module in found or module in ("mikernels", "mikernels._ops"):
            continue
        found[module] = path
        # a module brings its packages
        waiting += [module.rpartition(".")[0]]
        for name in imported(module, path):
            if name.split(".")[0] == "mikernels":
                waiting.append(name)
            elif name.split(".")[0] not in ALLOWED:
                raise SystemExit(f"hub: {path} imports {name}, which no kernel of the Hub may")
    return found


def relative(text: str, depth: int) -> str:
    """`text` with its imports of mikernels relative; its package lies `depth` below the top."""
    dots = "." * (depth + 1)
    text = re.sub(r"^(\s*)from mikernels import ", rf"\1from {dots} import ", text, flags=re.M)
    text = re.sub(r"^(\s*)from mikernels\.", rf"\1from {dots}", text, flags=re.M)
    left = re.search(r"^\s*(import mikernels.*|from mikernels.*)", text, re.M)
    if left:
        raise SystemExit(f"hub: {left[1]!r} cannot be made relative; import names from it")
    return text


def build_toml(version: str) -> str:
    """What the builder compiles: all of csrc/, the CPU's part in every variant."""

    def listed(values: object) -> str:
        return "[\n" + "".join(f'    "{value}",\n' for value in values) + "]"

    files = sorted(p.relative_to(ROOT) for p in (ROOT / "csrc").rglob("*") if p.is_file())
    cuda = [path for path in files if path.parts[1] == "cuda"]
    shared = [path for path in files if path not in cuda]
    # a kernel of CUDA includes the shared headers, which are listed once
    return f"""\
[general]
name = "mikernels"
version = {version.split(".")[0]}
edition = 5
license = "Apache-2.0"
upstream = "https://github.com/mikernels/mikernels"
backends = ["cpu", "cuda"]

[general.hub]
repo-id = "mikernels/mikernels"

[torch]
include = ["csrc"]
pyext = ["py", "json"]
cxx-flags = {listed((*FLAGS, *DEFINES))}
src = {listed(shared)}

[torch.stable-abi]
cpu = "{TORCH}"
cuda = "{TORCH}"

[kernel.mikernels_cuda]
backend = "cuda"
depends = ["torch"]
include = ["csrc"]
cuda-flags = {listed((*NVCC_FLAGS, *DEFINES))}
src = {listed(cuda)}
"""


def write(folder: Path) -> None:
    """The kernel's repository, in a folder that is new or empty."""
    if folder.exists() and any(folder.iterdir()):
        raise SystemExit(f"hub: {folder} must be a new or an empty folder; remove it first")
    known = modules()
    package = folder / "torch-ext/mikernels"
    for module, path in known.items():
        parts = module.split(".")[1:]
        target = package.joinpath(*parts, *(["__init__.py"] if path.name == "__init__.py" else []))
        target = target if target.suffix else target.with_suffix(".py")
        target.parent.mkdir(parents=True, exist_ok=True)
        depth = len(target.relative_to(package).parts) - 1
        target.write_text(relative(path.read_text(), depth))
    public = (ROOT / "mikernels/_public.py").read_text()
    (package / "__init__.py").write_text(relative(public, 0))
    (package / "_C.py").write_text(LOADED)
    shutil.copy(ROOT / "mikernels/_tuned.json", package)
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    shutil.copy(ROOT / "LICENSE", folder)
    text = (ROOT / "mikernels/_version.py").read_text()
    version = re.search(r'__version__ = "([^"]+)"', text)[1]
    (folder / "build.toml").write_text(build_toml(version))
    (folder / "flake.nix").write_text(FLAKE)
    (folder / "CARD.md").write_text(CARD.format(version=version, major=version.split(".")[0]))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python release/hub.py FOLDER")
    write(Path(sys.argv[1]))
