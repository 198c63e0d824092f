# SPDX-License-Identifier: Apache-2.0
"""The extension under AddressSanitizer and UndefinedBehaviorSanitizer."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import mikernels

ROOT = Path(__file__).resolve().parents[1]
# -O0 compiles in half the time of -O1 and hides nothing from the sanitizers
FLAGS = "-O0 -g1 -w -fsanitize=address,undefined -fno-sanitize-recover=all"


def runtime(compiler: str, library: str) -> str | None:
    """The path of a runtime library of the compiler, or None."""
    found = subprocess.run(
        [compiler, f"-print-file-name={library}"], capture_output=True, text=True, check=True
    ).stdout.strip()
    return found if os.path.isabs(found) and os.path.exists(found) else None


@pytest.fixture(scope="module")
def libraries() -> str:
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("no C++ compiler")
    paths = [runtime(compiler, f"lib{name}.so") for name in ("asan", "ubsan", "stdc++")]
    if None in paths:
        pytest.skip(f"{compiler} has no sanitizer runtime")
    return ":".join(paths)


@pytest.fixture(scope="module")
def extension(libraries: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """csrc compiled with sanitizers, from a copy: setup.py records its build facts in the tree."""
    source = tmp_path_factory.mktemp("sanitized")
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, source)
    for name in ("csrc", "kernels", "bench", "mikernels"):
        ignore = shutil.ignore_patterns("*.so", "__pycache__", "results")
        shutil.copytree(ROOT / name, source / name, ignore=ignore)
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", "lib", "--build-temp", "t"],
        cwd=source,
        env={
            **os.environ,
            # where pip puts ninja
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "MIKERNELS_EXT": "cpu",
            "CXXFLAGS": FLAGS,
            "LDFLAGS": "-fsanitize=address,undefined",
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return next((source / "lib/mikernels").glob("_C*.so"))


def test_sanitizers_find_nothing(extension, libraries):
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests/support/sanitizer_driver.py"), str(extension)],
        env={
            **os.environ,
            "LD_PRELOAD": libraries,
            # the interpreter and torch leave memory to the end of the process
            "ASAN_OPTIONS": "detect_leaks=0",
            "UBSAN_OPTIONS": "print_stacktrace=1",
            "OMP_WAIT_POLICY": "passive",
        },
        capture_output=True,
        text=True,
    )
    report = f"...{done.stdout[-500:]}\n{done.stderr[:6000]}"
    assert done.returncode == 0, report
    assert "runtime error" not in done.stderr and "Sanitizer" not in done.stderr, report
    assert done.stdout.splitlines()[-1] == " ".join(["clean", *mikernels.supported_levels()])
