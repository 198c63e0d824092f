# SPDX-License-Identifier: Apache-2.0
"""Builds `mikernels._C` against the torch that is already installed, or ships pure Python.

MIKERNELS_EXT: auto (default: build, fall back to pure Python with a warning), cpu (build or fail),
0 (never build). See CONTRIBUTING.md for the rest.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
EXT = os.environ.get("MIKERNELS_EXT", "auto")
FACTS = ROOT / "mikernels" / "_build.json"


def installed_torch():
    """The torch of the environment that is installed into, even from an isolated build."""
    # appended, so that the build requirements of the isolated environment still come first
    sys.path.append(sysconfig.get_paths()["purelib"])
    try:
        import torch
    except ImportError as error:
        return None, f"torch is not importable at build time ({error})"
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < (2, 10):
        return None, f"torch {torch.__version__} is older than 2.10"
    return torch, ""


def compiler():
    name = os.environ.get("CXX", "c++")
    if shutil.which(name) is None:
        return None, f"no C++ compiler ({name!r} is not on PATH)"
    return name, ""


def extension():
    """Keyword arguments for setup(), and the facts that `mikernels info` prints."""
    facts = {"extension": False, "reason": "", "mikernels_ext": EXT}
    if EXT == "0":
        facts["reason"] = "built with MIKERNELS_EXT=0"
        return {}, facts
    if EXT not in ("auto", "cpu"):
        raise SystemExit(f"MIKERNELS_EXT: expected auto, cpu or 0, got {EXT!r}")
    torch, why_torch = installed_torch()
    cxx, why_cxx = compiler()
    if torch is None or cxx is None:
        facts["reason"] = why_torch or why_cxx
        if EXT != "auto":
            raise SystemExit(f"mikernels: cannot build the extension: {facts['reason']}")
        print(f"mikernels: pure Python install: {facts['reason']}", file=sys.stderr)
        return {}, facts

    import pybind11
    from torch.utils import cpp_extension

    flags = ["-O3", "-std=c++20", "-fvisibility=hidden", "-fopenmp-simd", "-DNDEBUG", "-Wall"]
    # errno and traps are what keep sqrt and selects out of vector code
    flags += ["-fno-math-errno", "-fno-trapping-math"]
    flags += ["-Wno-unknown-pragmas", "-Wno-psabi"]
    # 2.10, the oldest torch whose stable ABI has parallel_for
    flags += ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DTORCH_STABLE_ONLY"]
    flags += os.environ.get("CXXFLAGS", "").split()
    sources = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").glob("**/*.cpp"))
    module = cpp_extension.CppExtension(
        "mikernels._C",
        sources,
        include_dirs=[str(ROOT / "csrc"), pybind11.get_include()],
        depends=sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").glob("**/*.h")),
        extra_compile_args={"cxx": flags},
    )
    facts |= {
        "extension": True,
        "torch": torch.__version__,
        "compiler": subprocess.run(
            [cxx, "--version"], capture_output=True, text=True, check=True
        ).stdout.splitlines()[0],
        "flags": flags,
        "machine": platform.machine(),
    }

    class Build(cpp_extension.BuildExtension):
        def build_extensions(self):
            try:
                super().build_extensions()
            except Exception as error:
                if EXT != "auto":
                    raise
                reason = f"compiling failed: {str(error).splitlines()[0]}"
                print(f"mikernels: pure Python install: {reason}", file=sys.stderr)
                FACTS.write_text(json.dumps({**facts, "extension": False, "reason": reason}))
                self.extensions = []

    return {"ext_modules": [module], "cmdclass": {"build_ext": Build}}, facts


arguments, facts = extension()
FACTS.write_text(json.dumps(facts, indent=1) + "\n")
setup(**arguments)
