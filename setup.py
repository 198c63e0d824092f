# SPDX-License-Identifier: Apache-2.0
"""Builds `mikernels._C` against the torch that is already installed, or ships pure Python.

What is built is within the stable ABIs of torch (2.10) and Python (3.10): one binary for all later
ones. MIKERNELS_EXT: auto (default: build, with CUDA where nvcc is; fall back to the CPU alone, then
to pure Python, with a warning), cuda (build with CUDA or fail), cpu (build without CUDA or fail),
0 (never build). MIKERNELS_ARCHS: GPU architectures. MIKERNELS_NAMESPACE: that of the operators.
See CONTRIBUTING.md for the rest.
"""

import base64
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

from setuptools import setup
from setuptools.command.editable_wheel import editable_wheel

ROOT = Path(__file__).resolve().parent
EXT = os.environ.get("MIKERNELS_EXT", "auto")
NAMESPACE = os.environ.get("MIKERNELS_NAMESPACE", "mikernels")
FACTS = ROOT / "mikernels" / "_build.json"
# A100, H100 and H200, B200, and what comes after them. Never those of the machine that builds: it
# may have no GPU, and wheels travel
ARCHS = "8.0;9.0;10.0+PTX"
# free-threaded Python has no limited API yet
LIMITED = not sysconfig.get_config_var("Py_GIL_DISABLED")


def packages():
    """Where the torch may be that is built against, the likeliest first: any from 2.10 on will do,
    since the binary is the same.

    pip builds in an environment of its own with the target's `sysconfig`. uv does not, and puts its
    own into VIRTUAL_ENV; but PATH still names the one that is activated, else uv means `.venv`.
    """
    yield sysconfig.get_path("purelib")
    places = [os.environ.get("VIRTUAL_ENV"), os.environ.get("CONDA_PREFIX")]
    places += [Path(entry).parent for entry in os.environ.get("PATH", "").split(os.pathsep)]
    for start in (Path(os.environ.get("PWD", ROOT)), ROOT):
        places += [folder / ".venv" for folder in (start, *start.parents)]
    for place in filter(None, (*places, sys.base_prefix)):
        yield sysconfig.get_path("purelib", vars={"base": str(place)})


def installed_torch():
    """The torch of the environment that is installed into, even from an isolated build."""
    for folder in packages():
        if Path(folder, "torch/__init__.py").exists():
            # appended, so that the build requirements of the isolated environment still come first
            sys.path.append(folder)
            break
    try:
        import torch
    except ImportError as error:
        return None, f"torch was not found by the build ({error}); first `pip install torch`"
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < (2, 10):
        return None, f"torch {torch.__version__} is older than 2.10; `pip install -U torch`"
    return torch, ""


def compiler():
    name = os.environ.get("CXX", "c++")
    if shutil.which(name) is None:
        return None, f"no C++ compiler ({name!r} is not on PATH; Debian, Ubuntu: apt install g++)"
    headers = [sysconfig.get_path("include"), sysconfig.get_path("platinclude")]
    if not any(Path(folder, "Python.h").exists() for folder in headers):
        return None, f"no Python.h in {headers[0]} (Debian, Ubuntu: apt install python3-dev)"
    return name, ""


def output(*command):
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def toolkit():
    """The folder of the CUDA toolkit and of its static runtime, or why there is none."""
    given = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    found = shutil.which("nvcc")
    # nvcc on PATH may be a link or a script that leads elsewhere
    homes = [given] if given else [found and Path(found).resolve().parents[1], "/usr/local/cuda"]
    for home in map(Path, filter(None, homes)):
        if (home / "bin/nvcc").exists():
            for folder in (*home.glob("lib64"), *home.glob("lib"), *home.glob("targets/*/lib")):
                if (folder / "libcudart_static.a").exists():
                    return home, folder, ""
    return None, None, f"no CUDA toolkit (nvcc, libcudart_static.a) in {given or 'PATH'}"


def architectures(nvcc):
    """What MIKERNELS_ARCHS, else TORCH_CUDA_ARCH_LIST, asks for, and nvcc's flags for it."""
    names = [name for name in ("MIKERNELS_ARCHS", "TORCH_CUDA_ARCH_LIST") if os.environ.get(name)]
    name = names[0] if names else ""
    known = set(output(nvcc, "--list-gpu-arch").split())
    archs, flags = [], []
    for arch in filter(None, re.split(r"[;,\s]+", os.environ[name] if name else ARCHS)):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", arch)
        number = "".join(match.groups()[:2]) if match else ""
        if f"compute_{number}" not in known:
            if not name:
                continue  # an older nvcc builds what it can
            raise ValueError(
                f"{name}: expected architectures that nvcc knows, such as {ARCHS!r}, got {arch!r}"
            )
        number += match[3]
        archs.append(arch)
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if match[4]:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    if not archs:
        raise ValueError(f"{name or 'nvcc'}: expected architectures such as {ARCHS!r}, got none")
    return archs, flags


def cuda(torch, cpp_extension, flags):
    """Additions to the extension's arguments that build csrc/cuda, and the facts about it."""
    if EXT == "cpu":
        return {}, {"reason": "built with MIKERNELS_EXT=cpu"}
    try:
        if torch.version.hip:
            raise ValueError(f"torch {torch.__version__} is for ROCm")
        home, libraries, why = toolkit()
        if home is None:
            raise ValueError(why)
        nvcc = str(home / "bin/nvcc")
        archs, arch_flags = architectures(nvcc)
        version = output(nvcc, "--version").split(" V")[-1].split()[0]
    except (ValueError, OSError, subprocess.CalledProcessError) as error:
        # a value meant for this package alone is a mistake even where CUDA is optional
        if EXT == "cuda" or str(error).startswith("MIKERNELS_ARCHS"):
            raise SystemExit(f"mikernels: cannot build with CUDA: {error}") from error
        print(f"mikernels: no CUDA kernels: {error}", file=sys.stderr)
        return {}, {"reason": str(error)}
    # torch leaves it unset where it has no CUDA itself
    cpp_extension.CUDA_HOME = str(home)
    nvcc_flags = ["-O3", "-std=c++20", "--threads", "2", "-Xcompiler", "-fvisibility=hidden"]
    nvcc_flags += [*(flag for flag in flags if flag.startswith("-D")), *arch_flags]
    if "CXX" in os.environ:
        nvcc_flags += ["-ccbin", os.environ["CXX"]]
    added = {
        "sources": sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc/cuda").glob("*.cu")),
        "nvcc": nvcc_flags,
        "library_dirs": [str(libraries)],
        # static: the extension also loads where there is no CUDA
        "libraries": ["cudart_static", "dl", "rt", "pthread"],
    }
    return added, {"reason": "", "nvcc": version, "archs": archs}


def extension():
    """Keyword arguments for setup(), and the facts that `mikernels info` prints."""
    facts = {"extension": False, "reason": "", "mikernels_ext": EXT, "namespace": NAMESPACE}
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", NAMESPACE):
        raise SystemExit(f"MIKERNELS_NAMESPACE: expected a name like mikernels, got {NAMESPACE!r}")
    if EXT == "0":
        facts["reason"] = "built with MIKERNELS_EXT=0"
        return {}, facts
    if EXT not in ("auto", "cpu", "cuda"):
        raise SystemExit(f"MIKERNELS_EXT: expected auto, cpu, cuda or 0, got {EXT!r}")
    torch, why_torch = installed_torch()
    cxx, why_cxx = compiler()
    if torch is None or cxx is None:
        facts["reason"] = why_torch or why_cxx
        if EXT != "auto":
            raise SystemExit(f"mikernels: cannot build the extension: {facts['reason']}")
        print(f"mikernels: pure Python install: {facts['reason']}", file=sys.stderr)
        return {}, facts

    from torch.utils import cpp_extension

    flags = ["-O3", "-std=c++20", "-fvisibility=hidden", "-fopenmp-simd", "-DNDEBUG", "-Wall"]
    # errno and traps are what keep sqrt and selects out of vector code
    flags += ["-fno-math-errno", "-fno-trapping-math"]
    flags += ["-Wno-unknown-pragmas", "-Wno-psabi"]
    # 2.10, the oldest torch whose stable ABI has parallel_for
    flags += ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DTORCH_STABLE_ONLY"]
    # Python's own flags ask for debug information, ten times the code in size
    flags += [f"-DMIK_NAMESPACE={NAMESPACE}", "-g0"]
    flags += os.environ.get("CXXFLAGS", "").split()
    sources = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").glob("**/*.cpp"))
    added, facts["cuda"] = cuda(torch, cpp_extension, flags)
    module = cpp_extension.CppExtension(
        "mikernels._C",
        sources + added.get("sources", []),
        include_dirs=[str(ROOT / "csrc")],
        depends=sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").glob("**/*.h")),
        extra_compile_args={"cxx": flags, "nvcc": added.get("nvcc", [])},
        library_dirs=[*added.get("library_dirs", [])],
        libraries=[*added.get("libraries", [])],
        # where torch has CUDA, libtorch brings the library in which csrc/cuda/device.h finds the
        # stream; nothing else is wanted of libtorch, and many linkers would drop it
        extra_link_args=["-Wl,--no-as-needed", "-ltorch"] if added else [],
        py_limited_api=LIMITED,
    )
    facts |= {
        "extension": True,
        "torch": torch.__version__,
        "compiler": output(cxx, "--version").splitlines()[0],
        "flags": flags,
        "machine": platform.machine(),
    }

    class Build(cpp_extension.BuildExtension):
        def build_extensions(self):
            self.forget_stale_objects()
            try:
                super().build_extensions()
                return
            except Exception as error:
                if EXT != "auto":
                    raise
                reason = f"compiling failed: {str(error).splitlines()[0]}"
            if added:
                print(f"mikernels: no CUDA kernels: {reason}", file=sys.stderr)
                self.record(cuda={"reason": reason})
                module.sources = sources
                module.libraries = [x for x in module.libraries if x not in added["libraries"]]
                added.clear()
                self.build_extensions()
                return
            print(f"mikernels: pure Python install: {reason}", file=sys.stderr)
            self.record(extension=False, reason=reason)
            self.extensions = []

        def copy_extensions_to_source(self):
            # one whose name holds a version of Python, as older sources built, is imported first
            for built in (ROOT / "mikernels").glob("_C.*.so"):
                built.unlink()
            super().copy_extensions_to_source()

        def forget_stale_objects(self):
            # where torch has no CUDA, it does not tell ninja which headers a .cu includes
            newest = max(header.stat().st_mtime for header in (ROOT / "csrc").glob("**/*.h"))
            for source in added.get("sources", []):
                made = (Path(self.build_temp) / source).with_suffix(".o")
                if made.exists() and made.stat().st_mtime < newest:
                    made.unlink()

        def record(self, **changed):
            facts.update(changed)
            # the second is the copy that a wheel is made of
            for folder in (ROOT, Path(self.build_lib)):
                if (folder / "mikernels").is_dir():
                    write(folder / "mikernels" / FACTS.name, facts)

    arguments = {"ext_modules": [module], "cmdclass": {"build_ext": Build}}
    if LIMITED:
        arguments["options"] = {"bdist_wheel": {"py_limited_api": "cp310"}}
    return arguments, facts


class Editable(editable_wheel):
    """An editable install that type checkers see too.

    Because `kernels` and `bench` lie beside `mikernels`, setuptools installs an import hook, which
    no type checker runs: they look in the folders of sys.path. So a folder with a link to
    `mikernels`, and nothing else, is put there.
    """

    def run(self):
        super().run()
        folder = ROOT / "build/editable"
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "mikernels").exists():
            try:
                (folder / "mikernels").symlink_to(ROOT / "mikernels", target_is_directory=True)
            except OSError as error:
                print(f"mikernels: no types for this editable install: {error}", file=sys.stderr)
                return
        for wheel in Path(self.dist_dir).glob("mikernels-*.whl"):
            # in this order: what is in sys.path is asked for at once; not _*_editable, which griffe
            # takes for that of another build system
            pth = f"import _mikernels_in_place\n{folder}\n"
            hook = HOOK.format(folder=str(folder), package=str(ROOT / "mikernels/__init__.py"))
            add_to_wheel(wheel, {"mikernels.pth": pth, "_mikernels_in_place.py": hook})


# Python itself imports from the checkout, not through the link: tracebacks and breakpoints then
# name the files that are edited
HOOK = """\
import sys
from importlib.util import spec_from_file_location


class Finder:
    @staticmethod
    def find_spec(name, target=None):
        return spec_from_file_location(name, {package!r}) if name == "mikernels" else None


def hook(path):
    if path != {folder!r}:
        raise ImportError
    return Finder


sys.path_hooks.insert(0, hook)
"""


def add_to_wheel(wheel, added):
    """More files, in a wheel and in its list of them."""
    with zipfile.ZipFile(wheel) as packed:
        files = {name: packed.read(name) for name in packed.namelist()}
    (record,) = (name for name in files if name.endswith(".dist-info/RECORD"))
    for name, text in added.items():
        files[name] = text.encode()
        digest = base64.urlsafe_b64encode(hashlib.sha256(files[name]).digest()).decode()
        files[record] += f"{name},sha256={digest.rstrip('=')},{len(files[name])}\n".encode()
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, content in files.items():
            packed.writestr(name, content)


def write(path, facts):
    path.write_text(json.dumps(facts, indent=1) + "\n")


arguments, facts = extension()
arguments.setdefault("cmdclass", {})["editable_wheel"] = Editable
write(FACTS, facts)
setup(**arguments)
