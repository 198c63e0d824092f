# SPDX-License-Identifier: Apache-2.0
"""The Hugging Face kernel that `release/hub.py` writes: its build.toml and its layout."""

import ast
import json
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

import mikernels

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).resolve().parents[1]


def hub(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "release/hub.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "kernel"
    done = hub(folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def build(kernel: Path) -> dict:
    return tomllib.loads((kernel / "build.toml").read_text())


def test_build_toml_lists_every_source_once(kernel, build):
    parts = [build["torch"], *build["kernel"].values()]
    listed = [source for part in parts for source in part["src"]]
    here = {str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*") if p.is_file()}
    assert len(listed) == len(set(listed)) and set(listed) == here
    for source in listed:
        assert (kernel / source).read_bytes() == (ROOT / source).read_bytes()
    # what a build without CUDA compiles needs nothing of CUDA
    assert not any(source.startswith("csrc/cuda/") for source in build["torch"]["src"])
    assert all((kernel / folder).is_dir() for part in parts for folder in part["include"])


def test_build_toml_is_of_the_format(build):
    """Names and types, of edition 5."""
    general = build["general"]
    assert (general["name"], general["edition"]) == ("mikernels", 5)
    assert general["version"] == int(mikernels.__version__.split(".")[0])
    assert {part["backend"] for part in build["kernel"].values()} | {"cpu"} == set(
        general["backends"]
    )
    assert set(build["torch"]["stable-abi"]) == set(general["backends"])
    # setup.py's target of the stable ABI
    (target,) = set(re.findall(r"TORCH_TARGET_VERSION=0x(\w{4})", (ROOT / "setup.py").read_text()))
    oldest = f"{int(target[:2], 16)}.{int(target[2:], 16)}"
    assert set(build["torch"]["stable-abi"].values()) == {oldest}
    # every flag on results that setup.py has
    assert {"-fno-math-errno", "-fno-trapping-math"} <= set(build["torch"]["cxx-flags"])


def test_the_package_imports_itself_by_relative_names_alone(kernel):
    package = kernel / "torch-ext/mikernels"
    roots = set()
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                roots |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                roots.add(node.module.split(".")[0])
    assert roots - set(sys.stdlib_module_names) == {"torch", "triton", "pydantic", "safetensors"}
    # by files alone that are imported where people have a table of their own, or save calls
    for name, only in (("pydantic", "schema.py"), ("safetensors", "tensor_files.py")):
        text = re.compile(rf"^\s*(import|from) {name}\b", re.M)
        assert [p.name for p in package.rglob("*.py") if text.search(p.read_text())] == [only]


def load(package: Path) -> list:
    done = subprocess.run(
        [sys.executable, ROOT / "tests/support/hub_driver.py", package],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_it_runs_beside_the_package_in_a_namespace_of_its_own(kernel, tmp_path):
    """Without a compiled part: that of another namespace is in tests/test_install.py."""
    package = tmp_path / "any name"
    shutil.copytree(kernel / "torch-ext/mikernels", package)
    (package / "_C.py").unlink()
    # as the builder writes it
    (package / "_ops.py").write_text(
        "import torch\n"
        "ops = torch.ops._mikernels_cpu_1234567\n"
        "def add_op_namespace_prefix(op_name: str):\n"
        '    return f"_mikernels_cpu_1234567::{op_name}"\n'
    )
    found, apart = load(package)
    assert found == [["_mikernels_cpu_1234567", "mikernels"], None, []]
    assert apart == ["__version__", "accelerate"]


def test_the_builders_flags_name_module_and_namespace(kernel, build, tmp_path):
    """module.cpp, compiled as the builder does, which gives its unique name as a macro."""
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    name, made = "_mikernels_cpu_1234567", tmp_path / "module.o"
    folders = [Path(torch.__file__).parent / "include", sysconfig.get_path("include"), "csrc"]
    flags = [flag for flag in build["torch"]["cxx-flags"] if flag != "-O3"]
    command = [compiler, "-std=c++20", "-fPIC", "-c", "csrc/module.cpp", "-o", made, *flags]
    command += [f"-I{folder}" for folder in folders]
    command += [f"-DTORCH_EXTENSION_NAME={name}", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    done = subprocess.run(command, cwd=kernel, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    binary = made.read_bytes()
    assert f"PyInit_{name}".encode() in binary and f"\0{name}\0".encode() in binary


def test_a_folder_that_holds_something_is_left_alone(tmp_path):
    (tmp_path / "mine").touch()
    done = hub(tmp_path)
    assert done.returncode and "must be a new or an empty folder" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
