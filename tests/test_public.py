# SPDX-License-Identifier: Apache-2.0
"""`import mikernels`: its names, and what is said where torch or kernels are absent."""

import subprocess
import sys
from pathlib import Path

import mikernels
from mikernels import _public

ROOT = Path(__file__).parent.parent

# as if a module were not installed
WITHOUT = """
import sys, warnings
sys.modules[{name!r}] = None
"""


def python(script: str, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-P", "-c", script, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def test_public_names() -> None:
    elsewhere = {"__version__", "accelerate"}
    assert set(mikernels.__all__) - elsewhere == set(_public.__all__)
    assert all(getattr(mikernels, name) is not None for name in mikernels.__all__)
    assert set(mikernels.__all__) <= set(dir(mikernels))
    try:
        mikernels.no_such_name  # noqa: B018
    except AttributeError as error:
        assert "'mikernels' has no attribute 'no_such_name'" in str(error)
    else:
        raise AssertionError("a name that is not there was found")


def test_without_torch_info_runs_and_the_rest_says_what_to_do() -> None:
    script = WITHOUT.format(name="torch") + "from mikernels.cli import main; main()"
    info = python(script, "info")
    assert info.returncode == 0, info.stderr
    assert "no torch" in info.stdout and "pip install 'torch>=2.10'" in info.stdout
    train = python(script, "train", "--activations", "x")
    assert train.returncode == 2 and "pip install 'torch>=2.10'" in train.stderr
    # nor where it is there and does not load, or where half of it was removed
    for broken in ("raise RuntimeError('no libtorch')", ""):
        script = (
            "import sys, types\n"
            "from importlib.machinery import ModuleSpec\n"
            "sys.meta_path.insert(0, found := types.SimpleNamespace())\n"
            "found.exec_module = lambda module: exec(text, module.__dict__)\n"
            "found.create_module = lambda spec: None\n"
            "found.find_spec = lambda name, *_: name == 'torch' and spec or None\n"
            f"spec, text = ModuleSpec('torch', found), {broken!r}\n"
            "spec.submodule_search_locations = ['/left/torch']\n"
            "from mikernels.cli import main; main()"
        )
        info = python(script, "info")
        assert info.returncode == 0 and "no torch" in info.stdout, info.stderr
        replay = python(script, "replay", "x")
        assert replay.returncode == 2 and "pip install" in replay.stderr, replay.stderr
        told = "no libtorch" if broken else "/left/torch is not all of it"
        assert told in " ".join(replay.stderr.split())
    # help and completion do not wait for torch
    assert "torch" not in python("import mikernels.cli, sys; print(*sys.modules)").stdout.split()


def test_pure_python_is_never_silent() -> None:
    script = WITHOUT.format(name="mikernels._C") + (
        "import mikernels, torch\n"
        "def caught(**more):\n"
        "    with warnings.catch_warnings(record=True) as found:\n"
        "        warnings.simplefilter('always')\n"
        "        mikernels.row_topk(torch.randn(2, 5), 2, **more)\n"
        "    return [str(w.message) for w in found]\n"
        "print(len(caught(impl='reference')))\n"
        "print(*caught())\n"
        "print(len(caught()))\n"
    )
    done = python(script)
    asked, said, again = done.stdout.splitlines()
    assert (asked, again) == ("0", "0"), done.stderr
    assert "plain PyTorch, several times slower" in said and "pip install" in said
