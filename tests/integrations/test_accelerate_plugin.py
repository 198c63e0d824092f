# SPDX-License-Identifier: Apache-2.0
"""The plugin accelerates the models of other suites' fixtures, for the length of a test."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SUITE = """
import copy
import pytest
import torch
from transformer_lens import HookedTransformer, HookedTransformerConfig

def make():
    return HookedTransformer(HookedTransformerConfig(
        n_layers=2, d_model=8, n_ctx=8, d_head=4, n_heads=2, d_vocab=11, attn_only=True, seed=0,
        device="cpu",
    ))

@pytest.fixture(scope="module")
def model():
    return make()

def test_results_off(model):
    assert "forward" not in vars(model.blocks[0].attn)
    model(torch.tensor([[1, 2, 3]]))
    assert "forward" not in vars(model.blocks[0].attn)

def test_results_on(model):
    model.set_use_attn_result(True)
    _, cache = model.run_with_cache(torch.tensor([[1, 2, 3]]))
    assert cache["result", 1].shape == (1, 3, 2, 8)
    assert "forward" in vars(model.blocks[0].attn)
    model(torch.tensor([[1, 2, 3]]))

def test_removed(model):
    assert "forward" not in vars(model.blocks[0].attn)
    assert len(model._forward_pre_hooks) == 1

def test_fails(model):
    model(torch.tensor([[1, 2, 3]]))
    assert False

def test_made_in_the_test():
    made = make()
    made.set_use_attn_result(True)
    for model in (made, copy.deepcopy(made)):
        model(torch.tensor([[1, 2, 3]]))
        assert "forward" in vars(model.blocks[0].attn)

def test_no_model():
    assert HookedTransformer.__init__.__module__.startswith("transformer_lens")
"""


@pytest.mark.peers
def test_another_suite(tmp_path):
    pytest.importorskip("transformer_lens", reason="transformer-lens is not installed")
    (tmp_path / "test_theirs.py").write_text(SUITE)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "accelerate_plugin", "test_theirs.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1] / "support")},
        capture_output=True,
        text=True,
    )
    assert "1 failed, 5 passed" in done.stdout, done.stdout + done.stderr
    assert "test_theirs.py::test_fails" in done.stdout
    # two layers, run twice in two tests and once in the one that fails
    assert "accelerated: 3 tests, 10 products by mikernels" in done.stdout
