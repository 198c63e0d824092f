# SPDX-License-Identifier: Apache-2.0
"""The package as people get it: sdist, wheel, isolated installs with and without a compiler."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import mikernels

pytestmark = pytest.mark.install

ROOT = Path(__file__).resolve().parents[1]
HERE = ("PYTHONPATH", "MIKERNELS_EXT", "MIKERNELS_ARCHS", "MIKERNELS_IMPL", "CXX", "CXXFLAGS")
HERE += ("TORCH_CUDA_ARCH_LIST", "CUDA_HOME", "CUDA_PATH", "MIKERNELS_NAMESPACE", "VIRTUAL_ENV")
# of the wheel that is built here; elsewhere the tests run what has the usual one
NAMESPACE = "mikernels_elsewhere"


def run(*command: object, cwd: Path, **environment: str) -> str:
    clean = {name: value for name, value in os.environ.items() if name not in HERE}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**clean, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-5000:]}"
    return done.stdout


class Environment:
    """A virtual environment that holds all of this one's packages but mikernels, as links."""

    def __init__(self, folder: Path):
        venv.create(folder, with_pip=False)
        self.python = folder / "bin/python"
        self.folder = folder
        packages = Path(
            run(
                self.python, "-c", "import sysconfig as s; print(s.get_path('purelib'))", cwd=folder
            ).strip()
        )
        for entry in Path(sysconfig.get_path("purelib")).iterdir():
            if "mikernels" not in entry.name and entry.name != "__pycache__":
                (packages / entry.name).symlink_to(entry)

    def pip(self, *arguments: object, cwd: Path, **environment: str) -> None:
        # --no-deps: an upgrade would follow the links into this environment
        command = self.python, "-m", "pip", arguments[0], "--no-deps", *arguments[1:]
        run(*command, cwd=cwd, PIP_DISABLE_PIP_VERSION_CHECK="1", **environment)

    def info(self) -> dict:
        return json.loads(run(self.folder / "bin/mikernels", "info", "--json", cwd=self.folder))

    def check(self, script: str) -> str:
        return run(self.python, "-c", script, cwd=self.folder).strip()


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    return Environment(tmp_path_factory.mktemp("environment"))


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, since setup.py records its build facts in the tree."""
    folder = tmp_path_factory.mktemp("sdist")
    ignore = shutil.ignore_patterns(".git", ".venv*", "build", "dist", "out", "*.so", "*.egg-info")
    shutil.copytree(ROOT, folder / "tree", ignore=ignore)
    run(sys.executable, "-m", "build", "--sdist", "-o", folder, cwd=folder / "tree")
    return next(folder.glob("*.tar.gz"))


@pytest.fixture(scope="module")
def source(sdist: Path) -> Path:
    """The unpacked sdist: everything below is installed from what people download."""
    with tarfile.open(sdist) as archive:
        archive.extractall(sdist.parent, filter="data")
    return sdist.parent / sdist.name.removesuffix(".tar.gz")


def names_in(folder: Path, pattern: str) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.glob(pattern)}


def test_sdist_holds_the_sources_and_nothing_built(source):
    for folder in ("csrc", "kernels", "bench", "mikernels", "tests", "release", "examples"):
        for suffix in ("py", "cpp", "h", "cu"):
            here, packed = (names_in(tree, f"{folder}/**/*.{suffix}") for tree in (ROOT, source))
            assert here - names_in(ROOT, "bench/results/**/*") == packed, folder
    for name in ("LICENSE", "README.md", "Makefile", "setup.py", "requirements/peers.txt"):
        assert (source / name).exists(), name
    assert not names_in(source, "**/*.so") and not (source / "mikernels/_build.json").exists()


needs_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "c++")) is None, reason="no C++ compiler"
)


@pytest.fixture(scope="module")
def broken_toolkit(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A CUDA toolkit whose compiler answers questions and cannot compile."""
    home = tmp_path_factory.mktemp("cuda")
    (home / "bin").mkdir()
    (home / "lib64").mkdir()
    (home / "lib64/libcudart_static.a").touch()
    nvcc = home / "bin/nvcc"
    nvcc.write_text(
        "#!/bin/sh\n"
        "case $1 in\n"
        "--list-gpu-arch) echo compute_80 compute_90 ;;\n"
        "--version) echo 'Cuda compilation tools, release 13.0, V13.0.88' ;;\n"
        "*) exit 1 ;;\n"
        "esac\n"
    )
    nvcc.chmod(0o755)
    return str(home)


@needs_compiler
def test_isolated_wheel_has_the_extension_without_cuda_if_need_be(
    source, environment, broken_toolkit, tmp_path
):
    # -O0: what is built is of interest here, not how fast it runs
    flags = {"MIKERNELS_EXT": "auto", "CXXFLAGS": "-O0 -w", "CUDA_HOME": broken_toolkit}
    flags["MIKERNELS_NAMESPACE"] = NAMESPACE
    environment.pip("wheel", "-w", tmp_path, source, cwd=tmp_path, **flags)
    wheel = next(tmp_path.glob("*.whl"))
    names = zipfile.ZipFile(wheel).namelist()
    # one wheel for every Python from 3.10 on
    release, _, rest = wheel.name.partition("-cp310-abi3-linux_")
    assert rest, wheel.name
    tops = {name.split("/")[0] for name in names}
    assert tops == {"mikernels", f"{release}.dist-info"}
    assert "mikernels/kernels/__init__.py" in names
    assert {f"mikernels/{name}" for name in names_in(ROOT, "bench/**/*.py")} <= set(names)
    assert {"mikernels/py.typed", "mikernels/_build.json"} <= set(names)
    assert [name for name in names if name.startswith("mikernels/_C.")] == ["mikernels/_C.abi3.so"]
    packages = {path.parent for path in (source / "mikernels").rglob("*.py")}
    packages |= {
        source / "mikernels" / path.parent.relative_to(source)
        for room in ("kernels", "bench")
        for path in (source / room).rglob("*.py")
        if not path.is_relative_to(source / "bench/results")
    }
    assert {str(p.relative_to(source)) for p in packages} <= {str(Path(n).parent) for n in names}

    environment.pip("install", wheel, cwd=tmp_path)
    info = environment.info()
    assert info["extension"] == {"loaded": True, "reason": ""}
    assert info["build"]["extension"] and info["level"] == info["supported_levels"][-1]
    assert info["build"]["cuda"]["reason"].startswith("compiling failed")
    assert info["operators"]["row_topk"]["cuda"] == info["build"]["cuda"]["reason"]
    assert all(states["cpp"] == "ready" for states in info["operators"].values())
    assert environment.check("import mikernels.kernels, mikernels.bench; print('imported')")
    # the name of another project's package
    assert (
        environment.check(
            "from importlib.util import find_spec as f; print(f('kernels'), f('bench'), f('csrc'))"
        )
        == "None None None"
    )
    check_symbols(environment)
    check_namespace(environment, source, tmp_path / "kernel")


def check_symbols(environment: Environment) -> None:
    """What manylinux_2_28 and the limited API allow: `make wheel` audits it all."""
    path = environment.check("from mikernels import _ext; print(_ext.C.__file__)")
    binary = Path(path).read_bytes()
    versions = {tuple(map(int, v)) for v in re.findall(rb"\0GLIBC_(\d+)\.(\d+)", binary)}
    assert versions and max(versions) <= (2, 28)
    # the one function of Python's that is called, and the one that Python calls
    names = set(re.findall(rb"\0(Py[A-Z_]\w+)(?=\0)", binary))
    assert names == {b"PyModule_Create2", b"PyInit__C"}


def check_namespace(environment: Environment, source: Path, kernel: Path) -> None:
    """Operators are where the build was told; and run there beside the usual ones."""
    found = environment.check(
        "import mikernels.ops, torch\n"
        "names = torch._C._dispatch_get_all_op_names()\n"
        "print({n.split('::')[0] for n in names if n.endswith(('::encode', '::cpu_level'))})"
    )
    assert found == str({NAMESPACE})
    assert environment.info()["build"]["namespace"] == NAMESPACE
    run(sys.executable, source / "release/hub.py", kernel, cwd=source)
    package = kernel / "torch-ext/mikernels"
    built = environment.check("from mikernels import _ext; print(_ext.C.__file__)")
    (package / "_C.py").unlink()
    shutil.copy(built, package)
    # Hugging Face's builder writes this, and names the extension as the namespace
    (package / "_ops.py").write_text(
        f"import torch\nfrom . import _C\nops = torch.ops.{NAMESPACE}\n"
        f"def add_op_namespace_prefix(name): return f'{NAMESPACE}::{{name}}'\n"
    )
    driver = ROOT / "tests/support/hub_driver.py"
    printed = run(sys.executable, driver, package, cwd=kernel).splitlines()[0]
    level = mikernels.supported_levels()[-1] if mikernels.supported_levels() else None
    spaces, runs_at, brought = json.loads(printed)
    assert (spaces, brought) == (["mikernels", NAMESPACE], [])
    assert runs_at is not None and level in (None, runs_at)


WORKS = """
import torch, mikernels
codes = mikernels.topk_encode(torch.randn(3, 5), torch.randn(9, 5), k=2)
print(mikernels.sparse_decode(codes, torch.randn(9, 5)).shape, mikernels.supported_levels())
"""


# one isolated build is enough: these spare themselves the fetching of setuptools
QUICK = ("install", "--no-build-isolation", "--force-reinstall")


@pytest.mark.parametrize(
    "variables, reason",
    [
        ({"CXX": "/nonexistent", "PATH": "/nonexistent"}, "no C++ compiler ('/nonexistent' is not"),
        ({"MIKERNELS_EXT": "0"}, "built with MIKERNELS_EXT=0"),
    ],
    ids=["no compiler", "MIKERNELS_EXT=0"],
)
def test_install_without_extension_works_and_says_why(source, environment, variables, reason):
    environment.pip(*QUICK, source, cwd=source, **variables)
    assert environment.check(WORKS) == "torch.Size([3, 5]) ()"
    info = environment.info()
    assert not info["extension"]["loaded"] and not info["build"]["extension"]
    assert reason in info["extension"]["reason"]
    assert "MIKERNELS_EXT=cpu pip install" in info["extension"]["reason"], "how to mend it"
    for states in info["operators"].values():
        assert states["reference"] == "ready" and reason in states["cpp"]


@pytest.mark.parametrize(
    "variables, message",
    [
        ({"MIKERNELS_EXT": "cpu", "CXX": "/nonexistent"}, "cannot build the extension: no C++"),
        ({"MIKERNELS_EXT": "yes"}, "MIKERNELS_EXT: expected auto, cpu, cuda or 0, got 'yes'"),
        ({"MIKERNELS_EXT": "cuda", "CUDA_HOME": "/nonexistent"}, "no CUDA toolkit (nvcc, "),
        ({"MIKERNELS_ARCHS": "9.0;hopper"}, "MIKERNELS_ARCHS: expected architectures that nvcc"),
        ({"MIKERNELS_ARCHS": "9.0;hopper"}, "got 'hopper'"),
        ({"MIKERNELS_ARCHS": "10.0"}, "got '10.0'"),
        ({"MIKERNELS_EXT": "cuda", "TORCH_CUDA_ARCH_LIST": "Hopper"}, "got 'Hopper'"),
    ],
)
def test_build_that_cannot_give_what_was_asked_for_fails(
    source, environment, broken_toolkit, variables, message
):
    variables = {"CUDA_HOME": broken_toolkit, **variables}
    with pytest.raises(AssertionError, match=re.escape(message)):
        run(environment.python, "setup.py", "--version", cwd=source, **variables)


def test_editable_install_imports_from_the_tree_and_has_types(source, environment, tmp_path):
    environment.pip(*QUICK, "-e", source, cwd=source, MIKERNELS_EXT="0")
    where = environment.check(
        "import mikernels, mikernels.kernels, mikernels.bench\n"
        "print(mikernels.__file__, mikernels.kernels.__file__, mikernels.bench.__file__)"
    )
    folders = ("mikernels", "kernels", "bench")
    assert where.split() == [str(source / folder / "__init__.py") for folder in folders]
    assert environment.check(WORKS) == "torch.Size([3, 5]) ()"
    # type checkers run no import hooks
    user = tmp_path / "user.py"
    user.write_text("import mikernels\n\nmikernels.topk_encode\n")
    mypy = "-m", "mypy", "--follow-imports=skip", "--cache-dir", tmp_path / "cache"
    run(environment.python, *mypy, user, cwd=tmp_path)


@pytest.mark.parametrize("place", ["PATH", "PWD", "nowhere"])
def test_an_isolated_build_finds_the_torch_of_the_environment(source, environment, tmp_path, place):
    """uv's tells it neither by sysconfig nor by VIRTUAL_ENV, but leaves PATH and PWD."""
    isolated = tmp_path / "isolated"
    venv.create(isolated, with_pip=False)
    found = run(isolated / "bin/python", "-c", "import sys; print(sys.path[-1])", cwd=tmp_path)
    for name in ("setuptools", "_distutils_hack"):
        (Path(found.strip()) / name).symlink_to(Path(sysconfig.get_path("purelib")) / name)
    (tmp_path / ".venv").symlink_to(environment.folder)
    paths = [str(isolated / "bin"), str(environment.folder / "bin"), os.environ["PATH"]]
    variables = {
        "VIRTUAL_ENV": str(isolated),
        "PATH": os.pathsep.join(p for p in paths if place == "PATH" or p != paths[1]),
        "PWD": str(tmp_path if place == "PWD" else isolated),
    }
    command = isolated / "bin/python", "setup.py", "--version"
    if place == "nowhere":
        (tmp_path / ".venv").unlink()
        # the environment of the tests may be activated
        variables["PATH"] = "/usr/bin:/bin"
        with pytest.raises(AssertionError, match="torch was not found by the build .* first `pip"):
            run(*command, cwd=source, MIKERNELS_EXT="cpu", **variables)
    else:
        run(*command, cwd=source, MIKERNELS_EXT="cpu", **variables)
        assert json.loads((source / "mikernels/_build.json").read_text())["extension"]


def test_the_metadata_say_who_where_and_under_which_terms(source, environment):
    environment.pip(*QUICK, source, cwd=source, MIKERNELS_EXT="0")
    script = "import importlib.metadata as m, json; print(json.dumps(m.metadata('mikernels').json))"
    told = json.loads(environment.check(script))
    assert told["license_expression"] == "Apache-2.0" and told["author"]
    labels = {entry.split(",")[0] for entry in told["project_url"]}
    assert {"Repository", "Documentation", "Issues", "Changelog"} <= labels
    assert told["keywords"] and "Typing :: Typed" in told["classifier"]


def test_import_is_quick_quiet_and_light():
    script = (
        "import sys, time, torch; start = time.perf_counter(); import mikernels;"
        "print(time.perf_counter() - start, *{'rich', 'typer', 'transformers', 'matplotlib',"
        " 'triton', 'safetensors'} & set(sys.modules))"
    )
    # the best of three: the first one may compile bytecode
    runs = [run(sys.executable, "-P", "-c", script, cwd=ROOT).split() for _ in range(3)]
    assert min(float(seconds) for seconds, *_ in runs) < 0.05
    assert all(heavy == [] for _, *heavy in runs)
