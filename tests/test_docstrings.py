# SPDX-License-Identifier: Apache-2.0
"""Examples in docstrings run as written, and every public operator has one.

They are about a user's model and tokeniser, for which tiny ones stand in here; what else they start
from is NAMES, as the pages of the reference say. `# doctest: +SKIP` is for what no stand-in can be
given: a user's files of text or activations, a run of some minutes, a package that is not here.
"""

import ast
import doctest
import inspect
from pathlib import Path

import pytest
import torch
from decoder_cases import task_words, tiny

import mikernels
from mikernels import activations, circuits, evaluate, nn, training
from mikernels.rate import save_evidence
from mikernels.values import Batch

PACKAGE = Path(mikernels.__file__).parent
ROOMS = (nn, activations, training, evaluate)
NAMES = {
    "torch": torch,
    "mk": mikernels,
    "circuits": circuits,
    "Batch": Batch,
    "save_evidence": save_evidence,
    **{name: getattr(room, name) for room in ROOMS for name in room.__all__},
}
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def examples():
    """(module, name) -> docstring, of every function and class that has an example."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        module = ".".join(["mikernels", *path.relative_to(PACKAGE).with_suffix("").parts])
        for node in ast.walk(ast.parse(text)) if ">>> " in text else ():
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
                docstring = ast.get_docstring(node) or ""
                if ">>> " in docstring:
                    key = module, getattr(node, "name", "")
                    assert key not in found, f"{key}: two of one name; one would not run"
                    found[key] = docstring
    return found


EXAMPLES = examples()


@pytest.fixture(scope="module")
def stand_ins():
    tokenizer = task_words()
    model = tiny("llama", torch.float32, vocab_size=len(tokenizer))
    return {"model": model, "tokenizer": tokenizer, "sae": nn.TopKSAE(24, 96, 8)}


@pytest.mark.parametrize("module, name", EXAMPLES, ids=lambda part: part.rpartition(".")[2])
def test_example(module, name, stand_ins, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = {**NAMES, **stand_ins}
    test = doctest.DocTestParser().get_doctest(EXAMPLES[module, name], names, name, module, 0)
    said: list[str] = []
    doctest.DocTestRunner(optionflags=OPTIONS, verbose=False).run(test, out=said.append)
    assert not said, "".join(said)


def test_every_operator_has_an_example():
    operators = {
        (found.__module__, name)
        for name in mikernels.__all__
        if inspect.isfunction(found := getattr(mikernels, name))
        and found.__module__.startswith("mikernels.ops.")
    }
    assert len(operators) > 20 and operators <= EXAMPLES.keys()
